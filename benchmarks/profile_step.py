"""Where a method's step differs from the floor's: self time of every operator, side by side, largest difference first.

    python -m benchmarks.profile_step losia [--dtype fp32] [--steps 3] [--top 15] [--device cuda]

The profiler itself costs time at every operator, so that many small operators look dearer than they are; `step_time` measures.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import header, table
from benchmarks.methods import Method, floor
from benchmarks.shapes import DTYPES, Shape, add_shape_options, shape_from
from benchmarks.step_time import METHODS
from benchmarks.timing import synchronize


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=15)
    add_shape_options(parser)
    options = parser.parse_args(arguments)
    print(header())
    shape = shape_from(options, options.dtype)
    found = compare(shape, options.method, options.steps)
    rows = [
        [entry["operator"], f"{entry['floor']:.2f}", f"{entry['method']:.2f}", f"{entry['difference']:+.2f}", entry["calls"]]
        for entry in found[: options.top]
    ]
    print(f"\n{shape}; ms a step\n" + table(["operator (self time)", "floor", options.method, "difference", "calls"], rows))
    return found


def compare(shape: Shape, name: str, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of self time a step per operator, of the floor and of the method; the two take turns, step by step."""
    both = {"floor": floor(shape), "method": METHODS[name](shape)}
    tokens = shape.tokens()
    times: dict[str, dict[str, float]] = {key: {} for key in both}
    calls: dict[str, float] = {}
    for method in both.values():
        method.step(tokens)
    for _ in range(steps):
        for key, method in both.items():
            for operator, (seconds, count) in _profiled(method, tokens, shape.device).items():
                times[key][operator] = times[key].get(operator, 0.0) + seconds * 1e3 / steps
                if key == "method":
                    calls[operator] = calls.get(operator, 0) + count / steps
    found = []
    for operator in times["floor"] | times["method"]:
        ours, base = times["method"].get(operator, 0.0), times["floor"].get(operator, 0.0)
        entry = {"operator": operator, "floor": base, "method": ours, "difference": ours - base}
        found.append({**entry, "calls": round(calls.get(operator, 0))})
    return sorted(found, key=lambda entry: -abs(entry["difference"]))


def _profiled(method: Method, tokens: Any, device: str) -> dict[str, tuple[float, int]]:
    gc.collect()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with profile(activities=kinds) as profiler:
        method.step(tokens)
        synchronize(tokens.device)
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return {event.key: (getattr(event, key) / 1e6, event.count) for event in profiler.key_averages()}


if __name__ == "__main__":
    main()
