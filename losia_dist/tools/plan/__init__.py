"""What a run needs before it is paid for: memory, traffic, time, schedule, disk; computed, or simulated on fake tensors."""
