"""A real all-reduce among all ranks: whether it sums, how long a small one takes, and how much a large one moves."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from losia_dist.tools.doctor.findings import Finding, error, ok

_ROUNDS, _LARGE_ROUNDS = 20, 3
_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of the large one


def measure(device: torch.device, group: Any) -> dict[str, float]:
    """All-reduce over a group. Called by all its ranks.

    Returns:
        "latency_us": median of 20 all-reduces of 4 bytes, microseconds. "bandwidth_gb_s": bus bandwidth of a large one in
        GB/s, 2 (n - 1) / n times its bytes over its seconds, as nccl-tests count it. "correct": 1.0 where the sums are right.
        The slowest rank counts.
    """
    size = dist.get_world_size(group)
    large = torch.ones(_BYTES[device.type] // 4, device=device)
    dist.all_reduce(large, group=group)  # the first one also connects
    correct = bool((large == size).all())
    median = sorted(_timed(torch.ones(1, device=device), group) for _ in range(_ROUNDS))[_ROUNDS // 2]
    best = min(_timed(large.fill_(1.0), group) for _ in range(_LARGE_ROUNDS))
    worst = torch.tensor([median, best, -float(correct)], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    latency, slowest, wrong = worst.tolist()
    moved = 2 * (size - 1) / size * large.numel() * 4
    return {"latency_us": latency * 1e6, "bandwidth_gb_s": moved / slowest / 1e9, "correct": -wrong}


def about(backend: str, measured: dict[str, float], hosts: int) -> Finding:
    """What to say of a measurement. The doctor knows no rate that is too low for a link: the figures are for the reader."""
    where = f"{hosts} hosts" if hosts > 1 else "one host"
    if measured["correct"] != 1.0:
        return error(backend, "all-reduce gives wrong sums.", "end the run on these hosts: a GPU, a link or a driver is broken")
    rates = f"{measured['latency_us']:.0f} us for 4 bytes, {measured['bandwidth_gb_s']:.2f} GB/s"
    return ok(backend, f"all-reduce over {where}: {rates}")


def _timed(tensor: torch.Tensor, group: Any) -> float:
    wait = torch.cuda.synchronize if tensor.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    wait()
    return time.perf_counter() - began
