"""Which runs are made: a learning-rate search of equal size for every method, then several seeds at the best rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.setting import Setting

RATES, MOST_RATES = 3, 6  # rates a factor of 2 apart that every search begins with, and the most that it may come to

Runner = Callable[[Setting], dict[str, Any]]


def search_rate(setting: Setting, centre: float, runner: Runner) -> float:
    """The rate whose run with `setting` has the least loss on the problems of the choice.

    The search begins with three rates around the centre. As long as the best lies at an edge, one more rate is tried
    beyond it, by the same rule for every method.
    """
    exponents = list(range(-(RATES // 2), RATES // 2 + 1))
    found = {exponent: _loss(runner(setting.at(rate=_rate(centre, exponent)))) for exponent in exponents}
    while len(found) < MOST_RATES:
        best = min(found, key=lambda exponent: found[exponent])
        if best not in (min(found), max(found)):
            break
        beyond = best - 1 if best == min(found) else best + 1
        found[beyond] = _loss(runner(setting.at(rate=_rate(centre, beyond))))
    return _rate(centre, min(found, key=lambda exponent: found[exponent]))


def run_method(setting: Setting, centre: float, seeds: Sequence[int], runner: Runner) -> float:
    """Search with the first seed, then run the others at the best rate; returns that rate."""
    rate = search_rate(setting.at(seed=seeds[0]), centre, runner)
    for seed in seeds[1:]:
        runner(setting.at(rate=rate, seed=seed))
    return rate


def _rate(centre: float, exponent: int) -> float:
    return centre * 2.0**exponent


def _loss(record: dict[str, Any]) -> float:
    loss = record["result"]["after"]["choice"]
    return math.inf if loss is None else float(loss)
