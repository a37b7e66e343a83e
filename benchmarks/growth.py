"""How LoSiA's cost grows with width, depth, sequence length, rank factor and world size.

    python -m benchmarks.growth [--axes width depth length rank-factor world-size] [--dtype fp32] [--budget 20] [--json FILE]

One axis changes at a time from a middle point. Each point is an interleaved ratio to that point's own floor: what must not
happen is that a ratio climbs. World size is shown in bytes (sent, and kept of the score, per rank), since several ranks
on one small machine would only time each other.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks import communication
from benchmarks.common import RESULTS, header, on_ranks, table, write_json
from benchmarks.methods import RANK_FACTOR, floor, losia
from benchmarks.shapes import DTYPES, Shape, add_shape_options, shape_from
from benchmarks.timing import interleave
from losia_dist.formulas import row_block

AXES: dict[str, list[Any]] = {
    "width": [256, 512, 1024, 2048],
    "depth": [2, 4, 8, 16],
    "length": [64, 128, 256, 512, 1024],
    "rank-factor": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2],
    "world-size": [1, 2, 4],
}
_COLUMNS = ["", "floor, seconds", "not localizing / floor", "95 % interval", "localizing / floor", "95 % interval"]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", nargs="+", type=float, help="values of a single axis, instead of its own")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for a point")
    add_shape_options(parser, layers=4, hidden=512, intermediate=1408, length=256)
    parser.add_argument("--json", default=str(RESULTS / "growth.json"))
    options = parser.parse_args(arguments)
    middle = shape_from(options, options.dtype)
    print(f"{header()}\nmiddle point: {middle}, p = {RANK_FACTOR}")
    results: dict[str, Any] = {"shape": middle.to_dict(), "axes": {}}
    for axis in options.axes:
        points = options.points or AXES[axis]
        if axis == "world-size":
            found = [world_size_point(int(ranks), middle) for ranks in points]
            print(
                "\n" + table(["ranks", *list(found[0])[1:]], [[f"{value:,.0f}" for value in entry.values()] for entry in found])
            )
        else:
            found = [point(middle, axis, value, options.rounds, options.budget) for value in points]
            print("\n" + table([axis, *_COLUMNS[1:]], [_row(entry) for entry in found]), flush=True)
        results["axes"][axis] = found
    write_json(options.json, results)
    return results


def point(middle: Shape, axis: str, value: float, rounds: int, budget: float) -> dict[str, Any]:
    """Ratios to the floor at one value of one axis."""
    factor = value if axis == "rank-factor" else RANK_FACTOR
    shape = _moved(middle, axis, value)
    others = [losia(shape, localizing=localizing, rank_factor=factor) for localizing in (False, True)]
    baseline = floor(shape)
    timings = interleave(baseline, others, shape.tokens(), rounds=rounds, budget=budget)
    found = {
        key: timings[m.name].summary() for key, m in zip(("floor", "losia", "localizing"), (baseline, *others), strict=True)
    }
    return {"value": value, **found}


def world_size_point(ranks: int, middle: Shape) -> dict[str, float]:
    """Bytes that one DDP rank sends in a step that ends a slot, and score rows that it keeps of the largest layer."""
    sent = on_ranks(ranks, communication.measure, "ddp", "losia", middle.layers, 64) if ranks > 1 else {}
    full = on_ranks(ranks, communication.measure, "ddp", "full", middle.layers, 64) if ranks > 1 else {}
    rows, columns = max(middle.linears(), key=lambda size: size[0] * size[1])
    start, stop = row_block(rows, 0, ranks)
    return {
        "ranks": ranks,
        "gradients, full": full.get("gradients", 0.0),
        "gradients, LoSiA": sent.get("gradients", 0.0),
        "one layer's full gradient": sent.get("localization", 0.0),
        "selection": sent.get("selection", 0.0),
        "averages kept, largest linear": 2.0 * 4 * (stop - start) * columns,
    }


def _moved(middle: Shape, axis: str, value: float) -> Shape:
    if axis == "width":
        return dataclasses.replace(middle, hidden=int(value), intermediate=int(value * 2.75))
    if axis == "depth":
        return dataclasses.replace(middle, layers=int(value))
    return dataclasses.replace(middle, length=int(value)) if axis == "length" else middle


def _row(entry: dict[str, Any]) -> list[str]:
    cells = [f"{entry['value']:g}", f"{entry['floor']['seconds']:.3f}"]
    for key in ("losia", "localizing"):
        cells += [f"{entry[key]['ratio']:.3f}", "{:.3f} to {:.3f}".format(*entry[key]["interval"])]
    return cells


if __name__ == "__main__":
    main()
