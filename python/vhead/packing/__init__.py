"""Rollouts that share tokens as one row: trees, attention along their paths, and which way a model can take."""
