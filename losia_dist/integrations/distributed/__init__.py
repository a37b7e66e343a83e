"""Models that Transformers itself distributes over ranks (`DistributedConfig`): FSDP2 and expert parallelism."""
