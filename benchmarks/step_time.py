"""Time of one optimizer step, as a ratio to the floor (frozen model, forward and dx only) measured right before and after.

    python -m benchmarks.step_time [--dtype fp32 bf16] [--methods losia lora64 ...] [--rounds 15] [--budget 150]
                                   [--layers 8 --hidden 1024 ...] [--device cuda] [--json FILE] [--add]

All methods of a run live in one process and take turns; medians of the ratios and their 95 % intervals are shown, optimizer
included. `cycle` runs LoSiA through its slots (a short period, so that every layer has its turn) and computes from it
the mean of a cycle at period T. `--add` pools the steps with those that the file holds of the same shape on the same machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import authors, methods
from benchmarks.common import RESULTS, bar, bar_table, header, read_results, table, write_json
from benchmarks.methods import Method, NotInstalledError, equal_lora_rank
from benchmarks.shapes import DTYPES, Shape, add_shape_options, shape_from
from benchmarks.timing import Timing, interleave

PERIOD = 50  # T of the mean over a cycle
_SHAPES = {"": "", "-columns": "1 x 1/64: "}  # ends of the names below, by the subnets that they measure
_CYCLE_PERIOD = 2  # every second step of the cycle measured ends a slot

METHODS: dict[str, Callable[[Shape], Method]] = {
    "losia": lambda shape: methods.losia(shape, localizing=False),
    "localizing": lambda shape: methods.losia(shape, localizing=True),
    "cycle": lambda shape: methods.losia(shape, localizing=True, period=_CYCLE_PERIOD, name="LoSiA, slots"),
    "losia-columns": lambda shape: methods.losia(
        shape, localizing=False, rank_factor=methods.COLUMNS, name="LoSiA 1 x 1/64, not localizing"
    ),
    "localizing-columns": lambda shape: methods.losia(
        shape, localizing=True, rank_factor=methods.COLUMNS, name="LoSiA 1 x 1/64, localizing one layer"
    ),
    "cycle-columns": lambda shape: methods.losia(
        shape, localizing=True, rank_factor=methods.COLUMNS, period=_CYCLE_PERIOD, name="LoSiA 1 x 1/64, slots"
    ),
    "short": methods.short,
    "matmuls": methods.matmuls,
    "lora": lambda shape: methods.lora(shape, equal_lora_rank(shape)),
    "lora-short": lambda shape: methods.lora(shape, equal_lora_rank(shape, 0.25), name="LoRA, as many as short,"),
    "lora16": lambda shape: methods.lora(shape, 16),
    "lora64": lambda shape: methods.lora(shape, 64),
    "lora64-cast": lambda shape: methods.lora(shape, 64, autocast=False),
    "dora": lambda shape: methods.lora(shape, 16, name="DoRA", use_dora=True),
    "shira": methods.shira,
    "galore": methods.galore,
    "full": methods.full,
    "full-master": methods.full_master,
    "plain": authors.plain,
    "pro": authors.pro,
}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="beside the floor")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which no further round begins, per dtype")
    add_shape_options(parser)
    parser.add_argument("--json", default=str(RESULTS / "step_time.json"))
    parser.add_argument("--add", action="store_true")
    options = parser.parse_args(arguments)
    print(header())
    results = read_results(options.json) if options.add else []
    for dtype in options.dtype:
        shape = shape_from(options, dtype)
        steps, missing = measure(shape, options.methods, options.rounds, options.budget)
        earlier = next((entry for entry in results if entry["shape"] == shape.to_dict()), None)
        if earlier is not None:
            results.remove(earlier)
            steps = _pooled(earlier["steps"], steps)
            missing = {name: why for name, why in {**earlier["not_measured"], **missing}.items() if name not in steps}
        results.append({"shape": shape.to_dict(), **summarize(steps, shape), "not_measured": missing, "steps": steps})
        print(f"\n{shape}\n{as_table(results[-1])}\n\n{bar_table(results[-1]['bars'])}", flush=True)
        write_json(options.json, results)
    return results


def measure(shape: Shape, names: Sequence[str], rounds: int, budget: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Steps of the floor and of the methods named (as `Timing`'s fields), and what was left out and why."""
    chosen, missing = {}, {}
    for name in names:
        if name == "lora64-cast" and shape.dtype == "fp32":
            continue  # PEFT's adapters are in fp32 there anyway: the same as lora64
        try:
            chosen[name] = METHODS[name](shape)
        except NotInstalledError as error:
            missing[name] = str(error)
    baseline = methods.floor(shape)
    timings = interleave(baseline, list(chosen.values()), shape.tokens(), rounds=rounds, budget=budget)
    return {name: asdict(timings[method.name]) for name, method in {"floor": baseline, **chosen}.items()}, missing


def summarize(steps: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Medians of every method, and the bars that they decide."""
    summaries = {name: Timing(**fields).summary() for name, fields in steps.items()}
    for suffix, of in _SHAPES.items():
        if (name := "cycle" + suffix) in summaries:
            summaries[name] = {**summaries[name], **_mean_of_cycle(of, summaries[name])}
    return {"methods": summaries, "bars": _bars(summaries, shape)}


def _pooled(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Steps of several runs together; each ratio is to that run's own floor."""
    pooled = {name: dict(fields) for name, fields in earlier.items()}
    for name, fields in later.items():
        own = pooled.setdefault(name, {"name": fields["name"]})
        own.update({key: own.get(key, []) + values for key, values in fields.items() if key != "name"})
    return pooled


def _mean_of_cycle(of: str, found: dict[str, Any]) -> dict[str, Any]:
    """Over T steps of a slot: T - 1 that collect importance, and one that re-localizes besides."""
    end = found.get("slot_end_ratio", found["ratio"])
    mean = (found["ratio"] * (PERIOD - 1) + end) / PERIOD
    return {"name": f"{of}LoSiA, mean of a cycle at T = {PERIOD}", "ratio_within_slot": found["ratio"], "ratio": mean}


def _bars(found: dict[str, dict[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    return [one for suffix, of in _SHAPES.items() for one in _bars_of_subnets(suffix, of, found, shape)]


def _bars_of_subnets(suffix: str, of: str, found: dict[str, dict[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """Bars of the subnets whose measurements' names end so."""
    ratio = {name: summary["ratio"] for name, summary in found.items()}
    own, localizing, cycle = (ratio.get(name + suffix) for name in ("losia", "localizing", "cycle"))
    others = [("lora64", "LoRA r = 64", 0.73 if shape.dtype == "bf16" else 0.85), ("full", "full fine-tuning", 0.75)]
    bars = [bar("preset short, slots / floor", ratio["short"], 1.03)] if "short" in ratio and not suffix else []
    for what, value, limit in (("no group localizing", own, 1.03), (f"mean of a cycle, T = {PERIOD}", cycle, 1.05)):
        if value is None:
            continue
        bars.append(bar(f"{of}{what} / floor", value, limit))
        bars += [bar(f"{of}{what} / {title}", value / ratio[name], most) for name, title, most in others if name in ratio]
    if localizing is not None and "matmuls" in ratio:
        extra = ratio["matmuls"] / (2 * shape.layers)
        bars.append(bar(f"{of}localizing / (floor + 1/2L of its matmuls)", localizing / (1 + extra), 1.03))
    return bars


def as_table(entry: dict[str, Any]) -> str:
    """The summaries, and a line for each method that could not be measured."""
    rows = [
        [found["name"], f"{found['seconds']:.3f}", f"{found['ratio']:.3f}", "{:.3f} to {:.3f}".format(*found["interval"])]
        + [str(found["steps"])]
        for found in entry["methods"].values()
    ]
    rows += [[name, "not measured", reason, "", ""] for name, reason in entry["not_measured"].items()]
    return table(["method", "seconds", "ratio to the floor", "95 % interval", "steps"], rows)


if __name__ == "__main__":
    main()
