"""The losses of an update."""
