"""Ranks, devices and process groups of a launched script (torchrun, deepspeed, accelerate, or none of them)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where this process stands: rank of world_size ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device


def find_place() -> Place:
    """From the launcher's environment variables; one process without them. Nothing is communicated."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    use_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local) if use_gpu else torch.device("cpu")
    return Place(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)


def start_process_group(place: Place) -> None:
    """Join the other ranks: NCCL on GPUs, gloo on CPUs."""
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if place.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))


def end_process_group() -> None:
    """Leave together: a rank that closes its connections early makes gloo abort on the others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
