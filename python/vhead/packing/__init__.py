"""Rollouts that share tokens as one row: trees, attention along their paths, and which strategy a model can take."""
