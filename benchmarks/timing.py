"""Interleaved timing: the baseline steps before and after every other method, and ratios are taken between neighbours."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.methods import Method


@dataclass
class Timing:
    """Steps of one method: seconds, and ratios to the mean of the two baseline steps around each.

    Steps that ended a time slot (a re-localization is in them) are kept apart.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    slot_end_seconds: list[float] = field(default_factory=list)
    slot_end_ratios: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians, and a 95 % bootstrap interval of the median ratio."""
        found: dict[str, Any] = {
            "name": self.name,
            "seconds": statistics.median(self.seconds),
            "ratio": statistics.median(self.ratios),
            "interval": list(median_interval(self.ratios)),
            "steps": len(self.ratios),
        }
        if self.slot_end_ratios:
            found["slot_end_ratio"] = statistics.median(self.slot_end_ratios)
            found["slot_ends"] = len(self.slot_end_ratios)
        return found


def interleave(
    baseline: Method,
    others: Sequence[Method],
    tokens: torch.Tensor,
    *,
    rounds: int,
    budget: float,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time `rounds` steps of every method, or as many rounds as begin within `budget` seconds (at least two).

    The order within a round is drawn anew each time, so that no method always runs behind the same neighbour.

    Args:
        clock: what a step is timed by; `time.process_time` on a CPU that others use too.
    """
    for method in (baseline, *others):
        for _ in range(warmup):
            method.step(tokens)
    timings = {method.name: Timing(method.name) for method in (baseline, *others)}
    began, order = time.perf_counter(), random.Random(0)
    before, _ = timed(baseline.step, tokens, clock)
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - began > budget:
            break
        for method in order.sample(list(others), len(others)):
            seconds, ended_slot = timed(method.step, tokens, clock)
            after, _ = timed(baseline.step, tokens, clock)
            own = timings[method.name]
            (own.slot_end_seconds if ended_slot else own.seconds).append(round(seconds, 6))
            (own.slot_end_ratios if ended_slot else own.ratios).append(round(2 * seconds / (before + after), 5))
            timings[baseline.name].seconds.append(round(after, 6))
            timings[baseline.name].ratios.append(round(2 * after / (before + after), 5))
            before = after
    return timings


def timed(
    step: Callable[[torch.Tensor], Any], tokens: torch.Tensor, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Seconds of one call, with the device waited for, and what it returned. Garbage is collected outside."""
    gc.collect()
    synchronize(tokens.device)
    began = clock()
    result = step(tokens)
    synchronize(tokens.device)
    return clock() - began, result


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_interval(values: Sequence[float], level: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap interval of the median; the draws are seeded."""
    source, size = random.Random(0), len(values)
    medians = sorted(statistics.median(source.choices(values, k=size)) for _ in range(draws))
    tail = (1 - level) / 2
    return medians[int(tail * draws)], medians[min(draws - 1, int((1 - tail) * draws))]
