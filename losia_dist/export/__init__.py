"""Plain model directories and deltas, from a live run or a checkpoint."""
