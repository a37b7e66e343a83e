"""What it costs to re-localize one layer, beside the time of the slot that ends with it.

    python -m benchmarks.relocalization [--dtype fp32 bf16] [--hidden 4096 --intermediate 11008 --depth 32] [--json FILE]

One decoder layer of the size given (7B by default) trains and is re-localized again and again: selection in all seven linears,
the old subnets written back, the new ones cut, moments cleared, checks. The slot is T steps of a model of `depth` such
layers; its time is counted as T x depth x the step of this one layer (the model's step less that of the same model without
the layer, so that embedding and loss are in neither).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common import RESULTS, bar, bar_table, header, table, write_json
from benchmarks.methods import Method, floor, losia
from benchmarks.shapes import DTYPES, LLAMA_7B, Shape, add_shape_options, shape_from
from benchmarks.timing import synchronize, timed

PERIOD = 50


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--depth", type=int, default=LLAMA_7B.layers, help="layers of the model whose slot is counted")
    parser.add_argument("--repeat", type=int, default=4)
    add_shape_options(parser, layers=1, hidden=LLAMA_7B.hidden, intermediate=LLAMA_7B.intermediate, vocabulary=256, heads=32)
    parser.add_argument("--json", default=str(RESULTS / "relocalization.json"))
    options = parser.parse_args(arguments)
    print(header())
    results = []
    for dtype in options.dtype:
        shape = dataclasses.replace(shape_from(options, dtype), layers=1)
        found = measure(shape, options.depth, options.repeat)
        results.append({"shape": shape.to_dict(), **found})
        rows = [
            ["step of one layer", f"{found['layer_seconds']:.3f} s"],
            ["re-localization of one layer", f"{found['relocalization_seconds']:.3f} s"],
            [f"slot of {PERIOD} steps of {options.depth} layers", f"{found['slot_seconds']:,.0f} s"],
            ["share of the slot", f"{found['share']:.4%}"],
            ["in steps of that model", f"{found['in_steps']:.3f}"],
        ]
        print(f"\n{shape}\n{table([dtype, 'value'], rows)}\n\n{bar_table(found['bars'])}", flush=True)
    write_json(options.json, results)
    return results


def measure(shape: Shape, depth: int, repeat: int) -> dict[str, Any]:
    """Medians over `repeat` steps, each of which ends a slot; the re-localization is timed by itself inside its step."""
    rest = floor(dataclasses.replace(shape, layers=0))
    tokens = shape.tokens()
    rest_seconds = _median_step(rest, tokens, repeat)
    del rest
    method = losia(shape, localizing=True, period=1)
    assert method.losia is not None
    moved: list[float] = []
    conductor_step = method.losia.step

    def timed_conductor() -> bool:
        synchronize(tokens.device)
        began = time.perf_counter()
        relocalized = conductor_step()
        synchronize(tokens.device)
        moved.append(time.perf_counter() - began)
        return relocalized

    method.losia.step = timed_conductor  # type: ignore[method-assign]
    method.step(tokens)
    moved.clear()
    whole = [timed(method.step, tokens)[0] for _ in range(repeat)]
    relocalization = statistics.median(moved)
    layer = statistics.median(whole) - relocalization - rest_seconds
    slot = PERIOD * depth * layer
    share = relocalization / slot
    return {
        "layer_seconds": layer,
        "relocalization_seconds": relocalization,
        "slot_seconds": slot,
        "share": share,
        "in_steps": relocalization / (depth * layer),
        "bars": [bar(f"re-localization / slot of {PERIOD} steps, {depth} layers", share, 0.01)],
    }


def _median_step(method: Method, tokens: Any, repeat: int) -> float:
    method.step(tokens)
    return statistics.median(timed(method.step, tokens)[0] for _ in range(repeat))


if __name__ == "__main__":
    main()
