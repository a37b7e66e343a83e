"""Launches that several tests look at, each made once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launching import BIN, ROOT, Launched, arguments, launch, make_material, torchrun


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> dict[str, Path]:
    return make_material(tmp_path_factory.mktemp("material"))


def accelerate(config: str, *options: str) -> list[str]:
    file = str(ROOT / "configs" / "accelerate" / f"{config}.yaml")
    words = [str(BIN / "accelerate"), "launch", "--config_file", file, "--num_processes", "2", "--main_process_port", "0"]
    return [*words, "--mixed_precision", "no", *options]


def deepspeed(port: int) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port)]


def zero(stage: int) -> str:
    return str(ROOT / "configs" / "deepspeed" / f"zero{stage}.json")


# The same run everywhere: four examples a step, from any number of ranks.
RUNS: dict[str, tuple[list[str], dict[str, object]]] = {
    "one process": ([sys.executable], {"micro_batch": 4}),
    "torchrun DDP": (torchrun(2), {"eval_steps": 2}),
    "deepspeed ZeRO-3": (deepspeed(29611), {"deepspeed": zero(3), "samples": 2, "sample_tokens": 4}),
    "accelerate FSDP2": (accelerate("fsdp2"), {"samples": 1, "sample_tokens": 4, "eval_steps": 3}),
    "deepspeed ZeRO-2": (deepspeed(29612), {"deepspeed": zero(2)}),
    "accelerate DDP": (accelerate("ddp"), {"micro_batch": 1, "gradient_accumulation": 2}),
    "accelerate ZeRO-2": (accelerate("zero2"), {}),
    "accelerate ZeRO-3": (accelerate("zero3"), {"micro_batch": 1, "gradient_accumulation": 2}),
    "accelerate one process": (
        accelerate("one-gpu", "--num_processes", "1", "--cpu"),
        {"micro_batch": 4, "samples": 1, "sample_tokens": 4},
    ),
}


@pytest.fixture(scope="session")
def launched(material, tmp_path_factory) -> Callable[[str], Launched]:
    """A run of RUNS by its name, launched when it is first asked for."""
    kept: dict[str, Launched] = {}

    def of(name: str) -> Launched:
        if name not in kept:
            launcher, options = RUNS[name]
            directory = tmp_path_factory.mktemp("run")
            kept[name] = launch(launcher, arguments(material, directory, **options), directory)
            assert kept[name].code == 0, kept[name].output[-4000:]
        return kept[name]

    return of
