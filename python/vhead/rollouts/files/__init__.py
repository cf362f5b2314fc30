"""Files of rollouts: where they are, how they are read, and the records that they hold."""
