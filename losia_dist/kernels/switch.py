"""Which kernels are on: the environment variable LOSIA_KERNELS, the same on every rank, or `use_kernels` in a program.

none (the default): torch alone. auto: every kernel, wherever the tensors are on a GPU and Triton can be imported; torch
elsewhere. A list ("write", "gradient", "write,gradient"): these kernels, and an error wherever one of them cannot run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch import Tensor

from losia_dist.errors import ConfigError

VARIABLE = "LOSIA_KERNELS"
NAMES = ("write", "gradient")
DEFAULT = "none"  # until a GPU has timed them

_chosen: str | None = None  # by use_kernels


@contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """While it holds, `choice` ("none", "auto" or a list) stands for the environment variable. For this process, all threads.

    Raises:
        ConfigError: as `check_kernels`.
    """
    global _chosen
    before, _chosen = _chosen, choice
    try:
        check_kernels()
        yield
    finally:
        _chosen = before


def kernel_choice() -> str:
    """What is asked for: "none", "auto" or a list of names."""
    return os.environ.get(VARIABLE, DEFAULT) if _chosen is None else _chosen


def check_kernels() -> None:
    """Refuse a choice that cannot work on this machine. Each rank by itself, before training; communicates nothing.

    Raises:
        ConfigError: an unknown name, or kernels asked for by name where Triton is missing.
    """
    choice = kernel_choice()
    if _asked(choice) and choice != "auto" and not has_triton():
        raise ConfigError(
            f"{VARIABLE}={choice}: these kernels need Triton, which is not installed (pip install triton). Install it, or set "
            f"{VARIABLE}=auto to use kernels only where they can run."
        )


def is_on(name: str, tensor: Tensor) -> bool:
    """Whether the kernel `name` is to work on this tensor; reads neither the tensor nor the device.

    Raises:
        ConfigError: the kernel was asked for by name, and cannot run here.
    """
    choice = kernel_choice()
    if name not in _asked(choice):
        return False
    if choice == "auto":
        return tensor.is_cuda and has_triton()
    check_kernels()
    if not tensor.is_cuda and not is_interpreted():
        raise ConfigError(
            f"{VARIABLE}={choice}: the kernel {name!r} runs on GPUs, and a tensor is on {tensor.device}. Set {VARIABLE}=auto "
            "or none (or TRITON_INTERPRET=1 from the start of the process, to try it slowly)."
        )
    return True


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _asked(choice: str) -> tuple[str, ...]:
    if choice in ("none", "auto"):
        return () if choice == "none" else NAMES
    names = tuple(name.strip() for name in choice.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(
            f"{VARIABLE}={choice!r}: {unknown[0]!r} is no kernel. Give none, auto, or a list of {', '.join(NAMES)}."
        )
    return names
