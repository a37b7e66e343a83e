"""Ranks that watch each other: one that dies, stops or leaves early ends the others with its name."""
