"""What a run is and what it runs on, written once when it begins: `losia_run.json`, and `losia_config.json` beside it."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from losia_dist._version import __version__
from losia_dist.config.losia_config import CONFIG_NAME, LoSiAConfig
from losia_dist.run.log_files import FACTS

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "trl", "datasets", "triton", "flash-attn", "liger-kernel")
GB = 10**9
_LONGEST = 5000  # characters of a value in a tracker's configuration of a run, of which MLflow takes 6000


def write_facts(directory: Path, config: LoSiAConfig | None, groups: Sequence[str], device: torch.device, **facts: Any) -> None:
    """Write both files. One process calls it, when training begins.

    Args:
        config: None in full fine-tuning; the other run's configuration is then removed from the directory.
        groups: names of the groups in localization order, in which every log line lists their learning rates.
        facts: plain values: engine, precision, ranks, steps, options ...

    Raises:
        OSError: the directory cannot be written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        config.save_pretrained(directory)
    else:
        (directory / CONFIG_NAME).unlink(missing_ok=True)
    content = {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "device": _name_of(device),
        "memory_of": "device" if device.type == "cuda" else "process",
        "versions": versions(),
        "groups": list(groups),
    }
    (directory / FACTS).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most since it began: allocated by torch on its GPU, or resident on a CPU.

    Nothing is waited for.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Of this package, Python, CUDA, and the packages that decide how a run computes, where they are installed."""
    found = {"losia_dist": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    toolkit = getattr(torch.version, "cuda", None) or getattr(torch.version, "hip", None)
    return found | ({"cuda or hip": str(toolkit)} if toolkit else {})


def flat_settings(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings as trackers take them: a mapping in them becomes one value for each of its own, losia_config/period; numbers
    stay numbers, and the rest is text."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat_settings(value, f"{before}{name}/")
        else:
            found[f"{before}{name}"] = value if isinstance(value, bool | int | float) else str(value)[:_LONGEST]
    return found


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
