"""What `accelerate launch` asks for, and Accelerate's saved states, with subnets."""
