"""Time of one optimizer step, as a ratio to the floor (frozen model, forward and dx only) measured in between.

    python -m benchmarks.step_time [--dtype bf16] [--layers 8 --hidden 1024 --intermediate 2816] [--repeat 7] [--device cuda]

All methods live in one process and take turns, round after round; medians are shown, optimizer included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch

from benchmarks.common import header, table, write_json
from benchmarks.methods import Method, Shape, equal_lora_rank, floor, full, lora, losia

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time of LoSiA, full fine-tuning and LoRA as ratios to the floor.")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    for name, value in (("layers", 8), ("hidden", 1024), ("intermediate", 2816), ("batch", 2), ("length", 512), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    print(header())
    results = []
    for dtype in options.dtype:
        sizes = {name: getattr(options, name) for name in ("layers", "hidden", "intermediate", "batch", "length")}
        shape = Shape(**sizes, dtype=DTYPES[dtype])
        results.append({"dtype": dtype, **sizes, "methods": measure(shape, options.device, options.repeat)})
        print(f"\n{dtype}, {sizes}, median of {options.repeat} interleaved steps")
        rows = [
            [
                entry["name"],
                f"{entry['seconds']:.3f}",
                f"{entry['ratio']:.3f}",
                f"{entry['spread'][0]:.3f} to {entry['spread'][1]:.3f}",
            ]
            for entry in results[-1]["methods"]
        ]
        print(table(["method", "seconds", "ratio to the floor", "range of ratios"], rows), flush=True)
    write_json(options.json, results)


def measure(shape: Shape, device: str, repeat: int) -> list[dict[str, Any]]:
    """Medians over rounds in which every method steps once, in turn; a round's ratios are to that round's floor."""
    methods = [
        floor(shape),
        losia(shape, localizing=False),
        losia(shape, localizing=True),
        lora(shape, equal_lora_rank(shape, 0.125)),
        lora(shape, 16),
        lora(shape, 64),
        full(shape),
    ]
    tokens = shape.tokens(device)
    for method in methods:
        method.model.to(device)
        method.step(tokens)
    times: dict[str, list[float]] = {method.name: [] for method in methods}
    for place in range(repeat):
        for method in methods if place % 2 else methods[::-1]:
            times[method.name].append(_timed(method, tokens, device))
    base = times[methods[0].name]
    results = []
    for method in methods:
        ratios = [mine / other for mine, other in zip(times[method.name], base, strict=True)]
        results.append(
            {
                "name": method.name,
                "seconds": statistics.median(times[method.name]),
                "ratio": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "times": times[method.name],
            }
        )
    return results


def _timed(method: Method, tokens: torch.Tensor, device: str) -> float:
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    method.step(tokens)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
