"""Finished runs to shares of full fine-tuning's gain, tables and the stored result."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.common import table
from benchmarks.quality.methods import METHODS
from benchmarks.quality.setting import Setting

REFERENCE = "full"  # whose gain the others' are shares of: every weight trains

Record = dict[str, Any]


def best_runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By label, the runs of one task at the rate whose first seed did best on the problems of the choice, in order of seeds."""
    found: dict[str, list[Record]] = {}
    for label, runs in _by_label(records).items():
        first = runs[0]["setting"]["seed"]
        searched = [run for run in runs if run["setting"]["seed"] == first]
        best = min(searched, key=lambda run: _or_worst(run["result"]["after"]["choice"]))["setting"]["rate"]
        chosen = {run["setting"]["seed"]: run for run in runs if run["setting"]["rate"] == best}
        found[label] = [chosen[seed] for seed in sorted(chosen)]
    return found


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """One task's summary: by label the mean and spread over seeds of gain, share, loss, score, forgetting, time, memory.

    "forgetting_of_lora" is what LoRA forgets where it gains as much. A share is the gain's part of full fine-tuning's mean
    gain (every weight trained, at its best rate); None without one.
    """
    best = best_runs(records)
    reference = statistics.fmean(_gain(run) for run in best[REFERENCE]) if best.get(REFERENCE) else None
    found = {}
    for label, runs in best.items():
        gains = [_gain(run) for run in runs]
        results = [run["result"] for run in runs]
        shares = [gain / reference for gain in gains] if reference else []
        found[label] = {
            "method": runs[0]["setting"]["method"],
            "options": runs[0]["setting"]["options"],
            "rate": runs[0]["setting"]["rate"],
            "seeds": [run["setting"]["seed"] for run in runs],
            "gain": _spread(gains),
            "share": _spread(shares),
            "held_out": _spread([result["after"]["held_out"] for result in results]),
            "score": _spread([result["score"] for result in results]),
            "score_before": results[0]["score_before"],
            "forgetting": _spread([result["forgetting"] for result in results]),
            "forgetting_of_lora": forgetting_at(records, "lora", statistics.fmean(gains)),
            "seconds_per_step": statistics.median(result["seconds_per_step"] for result in results),
            "seconds_of_preparation": statistics.median(result["seconds_of_preparation"] for result in results),
            "peak_bytes": max(result["peak_bytes"] for result in results),
            "trained_parameters": results[0]["trained_parameters"],
            "before": results[0]["before"],
        }
    return found


def share_of_full(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """By method, the mean over tasks of the mean share over seeds; methods with options of their own are left out."""
    shares: dict[str, list[float]] = {}
    for entries in tasks.values():
        for label, entry in entries.items():
            if label in METHODS and entry["share"] is not None:
                shares.setdefault(label, []).append(entry["share"]["mean"])
    return {label: round(statistics.fmean(found), 4) for label, found in shares.items() if len(found) == len(tasks)}


def forgetting_at(records: Sequence[Record], label: str, gain: float) -> float | None:
    """How much the method of this label forgets where it gains as much: between the nearest learning rates of its search.

    Rates beyond the best one count no longer: they forget more for less. None where all that is left gains less, or more.
    """
    runs = [run for run in _by_label(records).get(label, []) if run["result"]["forgetting"] is not None]
    runs = sorted(
        (run for run in runs if run["setting"]["seed"] == runs[0]["setting"]["seed"]), key=lambda r: r["setting"]["rate"]
    )
    best = max(range(len(runs)), key=lambda place: _gain(runs[place]), default=-1)
    points = [(_gain(run), run["result"]["forgetting"]) for run in runs[: best + 1]]
    for (low, forgotten_low), (high, forgotten_high) in pairwise(points):
        if low <= gain <= high:
            part = (gain - low) / (high - low) if high > low else 0.0
            return float(forgotten_low + part * (forgotten_high - forgotten_low))
    return None


def as_table(entries: dict[str, Any]) -> str:
    """One task's methods, the best gain first."""
    rows = []
    for label, entry in sorted(entries.items(), key=lambda item: -item[1]["gain"]["mean"]):
        title = METHODS[label].title if label in METHODS else label
        share = "" if entry["share"] is None else _shown(entry["share"], 100, 1, " %")
        lora = "" if entry["forgetting_of_lora"] is None else f"{entry['forgetting_of_lora']:.3f}"
        row = [title, f"{entry['rate']:.3g}", _shown(entry["held_out"]), share, _shown(entry["forgetting"]), lora]
        row += [_shown(entry["score"], 100, 1, " %"), f"{entry['seconds_per_step']:.2f}", f"{entry['peak_bytes'] / 1e6:,.0f}"]
        rows.append([*row, f"{entry['trained_parameters']:,}", len(entry["seeds"])])
    columns = ["method", "best rate", "held-out loss", "share of full", "forgetting", "LoRA's at that gain", "score"]
    return table([*columns, "s / step", "peak MB", "trained", "seeds"], rows)


def rate_table(records: Sequence[Record]) -> str:
    """Held-out loss and forgetting of every run of the searches."""
    rows = []
    for label, runs in _by_label(records).items():
        for run in sorted(runs, key=lambda run: (run["setting"]["seed"], run["setting"]["rate"])):
            result, setting = run["result"], run["setting"]
            values = [result["after"]["choice"], result["after"]["held_out"], result["forgetting"]]
            shown = ["not finite" if value is None else f"{value:.4f}" for value in values]
            rows.append([label, f"{setting['rate']:.3g}", setting["seed"], *shown])
    return table(["method", "rate", "seed", "loss, choice", "held-out loss", "forgetting"], rows)


def _by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(Setting(**record["setting"]).label, []).append(record)
    return found


def _gain(run: Record) -> float:
    gain = run["result"]["gain"]
    return float("-inf") if gain is None else float(gain)


def _or_worst(loss: float | None) -> float:
    return float("inf") if loss is None else loss


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, standard deviation over seeds (0 for one seed) and the values; None where one is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return {"mean": statistics.fmean(numbers), "deviation": deviation, "values": numbers}


def _shown(spread: dict[str, float] | None, factor: float = 1.0, digits: int = 3, unit: str = "") -> str:
    if spread is None:
        return ""
    text = f"{spread['mean'] * factor:.{digits}f}"
    return text + (f" ± {spread['deviation'] * factor:.{digits}f}" if len(spread["values"]) > 1 else "") + unit
