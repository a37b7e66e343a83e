"""All of a run's state on disk, from any engine, and a run that goes on from it."""
