"""What the benchmarks share: a header that says where numbers come from, tables, bars, JSON, and ranks on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import losia_dist
from benchmarks.ranks import free_port

RESULTS = Path(__file__).parent / "results"
_SHOWN = ("transformers", "peft", "deepspeed", "triton", "galore-torch")


def header() -> dict[str, Any]:
    """Machine and versions, to be printed above every table and stored beside every number."""
    versions = {"losia_dist": losia_dist.__version__, "torch": torch.__version__}
    for package in _SHOWN:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def _processor() -> str:
    """Model of the CPU; AMX and AVX-512 decide how fast bf16 is."""
    name, flags = platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
            elif line.startswith("flags"):
                flags = ", ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in line.split())
    except OSError:
        pass  # not Linux: the architecture is all that is known
    return f"CPU, {os.cpu_count()} cores, {name}" + (f" ({flags})" if flags else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, so that it can be pasted into the documentation as it is."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bar(name: str, measured: float, limit: float) -> dict[str, Any]:
    """One promise: what was measured, and the most it may be."""
    return {"bar": name, "measured": measured, "limit": limit, "met": measured <= limit}


def bar_table(bars: Sequence[dict[str, Any]]) -> str:
    """The promises as a table that says of each whether it was met."""
    rows = [
        [entry["bar"], f"{entry['measured']:.4g}", f"{entry['limit']:.4g}", "met" if entry["met"] else "NOT MET"]
        for entry in bars
    ]
    return table(["bar", "measured", "at most", ""], rows)


def write_json(path: str | Path | None, results: Any) -> None:
    """Store results with their header, if a path was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"header": header(), "results": results}, indent=1) + "\n", encoding="utf-8")


def read_results(path: str | Path) -> list[Any]:
    """Results that `write_json` stored on this machine with these versions; empty if there are none.

    Raises:
        SystemExit: they come from another machine or other versions, so that nothing may be added to them.
    """
    if not Path(path).exists():
        return []
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    if stored["header"] != header():
        raise SystemExit(f"{path} was measured elsewhere ({stored['header']}); choose another --json, or leave --add out.")
    results: list[Any] = stored["results"]
    return results


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run function(*arguments) on spawned gloo ranks; returns rank 0's result."""
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (world_size, free_port(), results, function, arguments), nprocs=world_size)
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
