"""Ranks, devices and process groups of a launched script (torchrun, deepspeed, accelerate, or none of them)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from losia_dist.errors import ConfigError

STOP_SECONDS = 20.0  # that a failed rank waits for the others to fail too, before it leaves them


@dataclass(frozen=True)
class Process:
    """This process among the others: rank of world_size ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device


def find_process() -> Process:
    """From the launcher's environment variables; one process without them. Nothing is communicated."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    use_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local) if use_gpu else torch.device("cpu")
    return Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)


def start_process_group(process: Process, timeout_minutes: float) -> dist.ProcessGroup | None:
    """Join the other ranks: NCCL for tensors on GPUs, gloo for those on CPUs. Called by all ranks, first of all.

    Args:
        timeout_minutes: that a rank waits for the others, here and in every later collective, before it gives up.

    Returns:
        a gloo group of all ranks for their agreement (on failures), apart from all other traffic; None for one
        process.

    Raises:
        ConfigError: no such GPU, or the other ranks did not come.
    """
    if process.device.type == "cuda":
        if (process.device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {process.rank} is to use GPU {process.device.index}, but this machine shows "
                f"{torch.cuda.device_count()}. Start at most one process per GPU."
            )
        torch.cuda.set_device(process.device)
    if process.world_size == 1:
        return None
    limit = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        # Both: with offloading, gradients are clipped where they are kept, on the CPU.
        backend = "cpu:gloo,cuda:nccl" if process.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=limit)
        except (dist.DistError, ValueError, RuntimeError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            if "EADDRINUSE" in str(error):
                raise ConfigError(
                    f"rank {process.rank} is to be met at {address}, and something else listens there, such as a rank that a "
                    "killed launcher left. `ss -ltnp` shows it: end it, or give the launcher another --master_port."
                ) from error
            raise ConfigError(
                f"rank {process.rank} did not meet the other {process.world_size - 1} at {address} within {timeout_minutes:g} "
                f"minutes: {error}. Start as many processes as WORLD_SIZE says; check the address and the firewall."
            ) from error
    return dist.new_group(backend="gloo", timeout=limit)


def all_stop(group: dist.ProcessGroup | None) -> bool:
    """Called by a rank that stops with an error: whether all ranks came here, and can leave together."""
    if group is None:
        return True
    try:
        work = dist.barrier(group=group, async_op=True)
        return bool(work is None or work.wait(timedelta(seconds=STOP_SECONDS)))
    except RuntimeError:
        return False


def end_process_group() -> None:
    """Leave together: a rank that closes its connections early makes gloo abort on the others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
