"""What the benchmarks share: a header that says where numbers come from, tables, JSON, and ranks on this machine."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def header() -> dict[str, Any]:
    """Machine and versions, to be printed above every table and stored beside every number."""
    import transformers

    import losia_dist

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    versions = {"losia_dist": losia_dist.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import deepspeed

        versions["deepspeed"] = deepspeed.__version__
    except ImportError:
        pass
    return {"device": device, "python": platform.python_version(), **versions}


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, so that it can be pasted into the documentation as it is."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: str | None, results: Any) -> None:
    """Store results with their header, if a path was given."""
    if path:
        Path(path).write_text(json.dumps({"header": header(), "results": results}, indent=2) + "\n", encoding="utf-8")


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run function(*arguments) on spawned gloo ranks; returns rank 0's result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (world_size, port, results, function, arguments), nprocs=world_size)
    return results.get()


def _rank(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    result = function(*arguments)
    if rank == 0:
        results.put(result)
    dist.barrier()
    dist.destroy_process_group()
