"""Measures the value head on this machine: its bits against the CPU's, its time against what else is installed."""
