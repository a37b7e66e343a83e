"""What a run needs at the least of memory and disk, against what is there: refused before anything is loaded.

Lower bounds, so that no run is refused that would fit: `losia-dist plan` adds up all of it.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from pathlib import Path

import torch

from losia_dist.digits import short
from losia_dist.errors import ConfigError
from losia_dist.export.weight_files import find_weights
from losia_dist.recipe.choice import EngineChoice
from losia_dist.recipe.environment import Process
from losia_dist.recipe.weights.model_files import local_directory
from losia_dist.recipe.weights.stored import open_files

GB = 1e9
_SURE = 0.75  # of what the files hold: a tied output layer may be in there twice, and some models leave a part unread
_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0, "fp8": 1.0}  # of a weight, by --quantization


def stored_weights(model: str) -> tuple[int, int] | None:
    """(values, bytes) of a model's safetensors files; None: they are not all on this machine, or cannot be read.

    Args:
        model: directory or hub name; nothing is downloaded for this.
    """
    try:
        directory = local_directory(model)
        if directory is None:
            return None
        whole, index = find_weights(lambda file: directory / file if (directory / file).is_file() else None)
        if whole is None and index is None:
            return None
        found = open_files([] if whole is None else [whole], index, lambda file: directory / file)
    except (ConfigError, OSError):  # the loader names it
        return None
    sizes = [(math.prod(tensor.shape), tensor.dtype) for tensor in found.values()]
    return sum(size for size, _ in sizes), sum(size * (dtype.itemsize if dtype else 1) for size, dtype in sizes)


def check_memory(options: argparse.Namespace, choice: EngineChoice, process: Process, free: int | None = None) -> None:
    """Each rank by itself. free: bytes, else those of its GPU, or of the host divided by its ranks.

    Raises:
        ConfigError: the weights alone do not fit there.
    """
    weights, deepspeed = stored_weights(options.model), choice.deepspeed or {}
    asked = deepspeed.get("zero_optimization", {})
    offloads = choice.offload or "offload_param" in asked or asked.get("cpu_offload_param")  # its older name
    if weights is None or offloads:
        return
    values, stored = weights
    each = _BYTES.get(options.quantization, _plain_bytes(choice))
    shared = _sharing_ranks(choice, process) if choice.cuts_weights else 1
    needed = _SURE * min(values * each, stored if _is_quantized(values, stored) else math.inf) / shared
    free, place = (free, "here") if free is not None else _free_memory(process)
    if needed > free:
        raise ConfigError(
            f"--model {options.model}: its weights alone take at least {short(needed / GB)} GB of each rank's memory, and "
            f"{short(free / GB)} GB are free {place}. Share them among more ranks (--sharding fsdp2, or ZeRO-3), or take "
            "--quantization nf4 or a smaller model; losia-dist plan adds up everything that a run takes."
        )


def check_disk(options: argparse.Namespace, choice: EngineChoice) -> None:
    """One rank calls it, with --output_dir made.

    Raises:
        ConfigError: the trained model, and the base that checkpoints keep once, do not fit there.
    """
    weights = stored_weights(options.model)
    directory = Path(options.output_dir).absolute()
    # What an earlier run left is either taken up or replaced.
    if weights is None or any(directory.glob("*")):
        return
    values, stored = weights
    model = values * _plain_bytes(choice)
    quantized = options.quantization is not None or _is_quantized(values, stored)
    copies = {"the trained model": not options.no_save, "checkpoints' base": bool(options.save_steps) and not quantized}
    needed = _SURE * model * sum(copies.values())
    free = shutil.disk_usage(directory).free
    if needed > free:
        what = " and ".join(name for name, there in copies.items() if there)
        raise ConfigError(
            f"--output_dir {options.output_dir}: {what} take at least {short(needed / GB)} GB, and {short(free / GB)} GB are "
            "free there. Free some, or give a directory on another file system; losia-dist doctor counts all that a run writes."
        )


def _plain_bytes(choice: EngineChoice) -> int:
    """Of a weight that is not quantized."""
    return 2 if choice.precision == "bf16" else 4


def _is_quantized(values: int, stored: int) -> bool:
    return stored < 1.5 * values


def _sharing_ranks(choice: EngineChoice, process: Process) -> int:
    """Ranks that hold one copy of the weights among them."""
    return choice.sharding.ranks or process.world_size if choice.sharding is not None else process.world_size


def _free_memory(process: Process) -> tuple[int, str]:
    """Bytes, and where they are."""
    if process.device.type == "cuda":
        free = torch.cuda.mem_get_info(process.device)[0]
        # Of memory that it shares with the host, CUDA calls what the page cache holds taken, as it is once files were read.
        is_shared = getattr(torch.cuda.get_device_properties(process.device), "is_integrated", False)
        return max(free, _free_of_host()[0]) if is_shared else free, f"on {process.device}"
    return _free_of_host()


def _free_of_host() -> tuple[int, str]:
    """Of one of its ranks."""
    if not Path("/proc/meminfo").is_file():
        return 1 << 62, "here"
    pages = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()}
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 1024 * int(pages["MemAvailable"]) // ranks, f"on this machine, divided by its {ranks} ranks" if ranks > 1 else "here"
