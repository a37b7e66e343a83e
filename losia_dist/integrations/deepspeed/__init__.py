"""`deepspeed.initialize` and an engine's checkpoints, with subnets."""
