"""Processes among each other: agreement, comparison, interruption, and noticing that one of them is lost."""
