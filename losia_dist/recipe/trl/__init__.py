"""Preference tuning and reinforcement learning from the command line, over TRL's trainers."""
