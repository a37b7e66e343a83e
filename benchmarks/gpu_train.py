"""One task of the GPU run: tokens/s, peak memory and ratio to the floor of each method on one model. Prints JSON lines.

    python -m benchmarks.gpu_train 1b|8b|8b-nf4|moe --length 2048 [--batch 1] [--methods losia ...] [--checkpointing]

The floor's model stays on the GPU and steps before and after every step of a method; its memory is not counted to the
method. With --floor-first it is measured and let go, for methods that need the memory themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import experts, methods, quantized_step, step_time
from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.methods import Method, NotInstalledError
from benchmarks.shapes import LLAMA_1B, LLAMA_8B
from benchmarks.timing import Timing, interleave, median_interval, timed


class Kind(NamedTuple):
    """A model with its floor and its methods, of which `default` are measured; `tiny` are its sizes in a rehearsal."""

    shape: Any
    floor: Callable[[Any], Method]
    methods: dict[str, Callable[[Any], Method]]
    default: tuple[str, ...]
    tiny: dict[str, int]


_TINY = {"layers": 2, "hidden": 64, "intermediate": 128, "vocabulary": 256, "heads": 4, "kv_heads": 2}
_DEFAULT = ("losia", "localizing", "lora64", "full")
# Layers of Qwen3-30B-A3B, a quarter of them: 7.6 B weights, of which a token takes 0.7.
_MOE = experts.ExpertShape(experts=128, top=8, layers=12, hidden=2048, expert_size=768, vocabulary=32000)
# Of GPUs with units for FP8 alone: on a CPU its time says nothing.
_FLOAT8 = {
    "losia-fp8": lambda shape: methods.losia(
        shape, localizing=False, weight_products="fp8", name="LoSiA, not localizing, FP8 products"
    )
}
KINDS = {
    "1b": Kind(LLAMA_1B, methods.floor, step_time.METHODS, _DEFAULT, _TINY),
    "8b": Kind(LLAMA_8B, methods.floor, {**step_time.METHODS, **_FLOAT8}, _DEFAULT, _TINY),
    "8b-nf4": Kind(
        quantized_step.QuantizedShape(**LLAMA_8B.to_dict()),
        quantized_step.floor,
        quantized_step.METHODS,
        ("losia", "short", "qlora"),
        _TINY,
    ),
    "moe": Kind(
        _MOE,
        experts.floor,
        experts.METHODS,
        ("losia", "lora", "lora16"),
        {"layers": 2, "hidden": 64, "expert_size": 64, "vocabulary": 256, "experts": 4, "top": 2},
    ),
}
_ROUNDS, _BUDGET = 8, 5.0  # of one method: rounds, or the seconds after which no further one begins


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=KINDS)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--methods", nargs="+", help="other than the model's usual ones")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--floor-first", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    began, seconds = time.monotonic(), float(os.environ.get("BENCHMARK_SECONDS", "inf"))
    kind = KINDS[options.model]
    chosen = list(options.methods or kind.default)
    if unknown := set(chosen) - set(kind.methods):
        parser.error(f"--methods {' '.join(sorted(unknown))}: {options.model} has {', '.join(kind.methods)}")
    size: dict[str, Any] = {"length": options.length, "batch": options.batch, "checkpointing": options.checkpointing}
    size |= {"dtype": "bf16", "device": "cuda"}
    if options.rehearse:
        size |= {**kind.tiny, "length": 16, "batch": 1, "device": "cpu"}
    kind = kind._replace(shape=dataclasses.replace(kind.shape, **size))
    rounds = 2 if options.rehearse else _ROUNDS
    if options.model == "8b" and not options.floor_first and "full" in chosen:
        chosen.remove("full")  # its state leaves no room for the floor's model beside it: a task of its own
    compared = _Floor(kind, options.compiled, rounds, let_go=options.floor_first)
    for name in chosen:
        if time.monotonic() - began > seconds - _BUDGET:
            break
        try:
            print(json.dumps({"key": name, **compared.measure(name)}), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            print(json.dumps({"key": name, "not_measured": f"out of memory: {str(error)[:200]}"}), flush=True)
        except NotInstalledError as error:
            print(json.dumps({"key": name, "not_measured": str(error)}), flush=True)
        _collect(kind.shape.device)


class _Floor:
    """The floor's model, and the measurements against it."""

    def __init__(self, kind: Kind, compiled: bool, rounds: int, *, let_go: bool) -> None:
        shape = kind.shape
        self.methods = kind.methods
        self.shape, self.compiled, self.rounds, self.tokens = shape, compiled, rounds, shape.tokens()
        _collect(shape.device)
        self.alone: list[float] | None = None
        before = _held(shape.device)
        method = self._made(kind.floor(shape))
        peak = self._peak(method, before)
        seconds = [timed(method.step, self.tokens)[0] for _ in range(rounds)]
        line = {"method": method.name, "ratio": 1.0, "interval": [1.0, 1.0], "peak": peak, **self._speed(seconds)}
        print(json.dumps({"key": "floor", **line}), flush=True)
        self.method: Method | None = method
        if let_go:
            self.alone, self.method = seconds, None
            del method
            _collect(shape.device)

    def measure(self, name: str) -> dict[str, Any]:
        """One method's name, ratio to the floor, seconds, tokens/s, and peak memory without the floor's model."""
        before = _held(self.shape.device)
        method = self._made(self.methods[name](self.shape))
        peak = self._peak(method, before)
        if self.method is not None:
            timing = interleave(self.method, [method], self.tokens, rounds=self.rounds, budget=_BUDGET, warmup=1)[method.name]
        else:
            assert self.alone is not None
            timing, base = Timing(method.name), statistics.median(self.alone)
            timing.seconds = [timed(method.step, self.tokens)[0] for _ in range(self.rounds)]
            timing.ratios = [seconds / base for seconds in timing.seconds]
        ratio, interval = statistics.median(timing.ratios), list(median_interval(timing.ratios))
        found = {"method": method.name, "ratio": ratio, "interval": interval, "peak": peak}
        return {**found, **self._speed(timing.seconds)}

    def _made(self, method: Method) -> Method:
        if self.compiled:
            method.model.compile()
        return method

    def _peak(self, method: Method, before: int) -> int:
        """Most memory of two steps, the first of which makes the optimizer's state (and compiles)."""
        reset_peak(self.shape.device)
        for _ in range(2):
            timed(method.step, self.tokens)
        return peak_bytes(self.shape.device) - before

    def _speed(self, seconds: list[float]) -> dict[str, float]:
        median = statistics.median(seconds)
        return {"seconds": median, "tokens_per_second": self.tokens.numel() / median}


def _held(device: str) -> int:
    return torch.cuda.memory_allocated() if device != "cpu" else 0


def _collect(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
