"""The files of a checkpoint, on disk or on the hub: read when asked for, written whole."""
