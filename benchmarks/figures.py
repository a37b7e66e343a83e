"""The stored results as figures (SVG), one for each benchmark that has results.

python -m benchmarks.figures [--results benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

_OURS, _OTHERS, _FLOOR = "#1b6ca8", "#b0b0b0", "#444444"


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install 'losia_dist[benchmarks]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "losia", "font.size": 8})
    written = []
    for name, draw in FIGURES.items():
        source = options.results / f"{name}.json"
        if not source.exists():
            continue
        stored = json.loads(source.read_text(encoding="utf-8"))
        figure = draw(stored["results"])
        figure.suptitle(stored["header"]["device"], fontsize=7, x=0.99, ha="right")
        figure.tight_layout()
        written.append(source.with_suffix(".svg"))
        figure.savefig(written[-1], metadata={"Date": None})
        print(written[-1])
    return written


def _step_time(results: list[dict[str, Any]]) -> Any:
    figure, axes = _panels(results)
    for axis, entry in zip(axes, results, strict=True):
        found = [m for key, m in entry["methods"].items() if key not in ("matmuls", "floor")]
        found.sort(key=lambda method: -method["ratio"])
        errors = [[abs(m["ratio"] - m["interval"][side]) for m in found] for side in (0, 1)]
        _bars(axis, [(m["name"], m["ratio"]) for m in found], errors)
        axis.axvline(1.0, color=_FLOOR, linewidth=1)
        axis.set_xlabel("step time / floor (forward and dx)")
        axis.set_title(entry["shape"]["dtype"])
    return figure


def _memory(results: list[dict[str, Any]]) -> Any:
    figure, axes = _panels(results)
    for axis, entry in zip(axes, results, strict=True):
        found = sorted(entry["methods"].values(), key=lambda method: -method["peak"])
        _bars(axis, [(m["name"], m["peak"] / 1e6) for m in found])
        axis.set_xlabel("peak of the process, MB")
        axis.set_title(entry["shape"]["dtype"])
    return figure


def _communication(results: list[dict[str, Any]]) -> Any:
    figure, (axis,) = _panels([results])
    purposes = ("gradients", "localization", "selection")
    for place, entry in enumerate(results):
        axis.barh(place + 0.2, entry["full"]["gradients"] / 1024, height=0.35, color=_OTHERS)
        left = 0.0
        for purpose, colour in zip(purposes, (_OURS, "#6aa9d8", "#bcd9ee"), strict=True):
            axis.barh(place - 0.2, entry["losia"][purpose] / 1024, left=left, height=0.35, color=colour)
            left += entry["losia"][purpose] / 1024
    axis.set_yticks(range(len(results)), [entry["engine"] for entry in results])
    axis.set_xscale("log")
    axis.set_xlabel("KB sent per rank and step: full fine-tuning (grey); LoSiA's gradients, localization, selection (blue)")
    return figure


def _growth(results: dict[str, Any]) -> Any:
    axes_found = {name: points for name, points in results["axes"].items() if name != "world-size"}
    figure, axes = _panels(list(axes_found))
    for axis, (name, points) in zip(axes, axes_found.items(), strict=True):
        values = [point["value"] for point in points]
        for key, style in (("losia", "o-"), ("localizing", "s--")):
            axis.plot(values, [point[key]["ratio"] for point in points], style, color=_OURS, label=key)
        axis.axhline(1.0, color=_FLOOR, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(name)
        axis.set_ylabel("step time / floor")
        axis.legend()
    return figure


def _quality(results: dict[str, Any]) -> Any:
    """By task: shares of full fine-tuning's gain, with their spread over seeds; what each learning rate gains and forgets."""
    tasks = results["tasks"]
    figure, axes = _panels([None] * 2 * len(tasks))
    for place, (task, entries) in enumerate(tasks.items()):
        shares, rates = axes[2 * place], axes[2 * place + 1]
        found = sorted(((name, e["share"]) for name, e in entries.items() if e["share"]), key=lambda item: item[1]["mean"])
        values = [(_quality_name(name), 100 * share["mean"]) for name, share in found]
        _bars(shares, values, [100 * share["deviation"] for _, share in found])
        shares.axvline(100.0, color=_FLOOR, linewidth=1)
        shares.set_xlabel("held-out gain, % of full fine-tuning's; spread over seeds")
        shares.set_title(task)
        runs = [run for run in results["runs"][task] if None not in (run["result"]["gain"], run["result"]["forgetting"])]
        for colour, name in enumerate(entries):
            method = entries[name]["method"], entries[name]["options"]
            own = [run for run in runs if (run["setting"]["method"], run["setting"]["options"]) == method]
            own.sort(key=lambda run: (run["setting"]["seed"], run["setting"]["rate"]))
            first = [run["result"] for run in own if run["setting"]["seed"] == own[0]["setting"]["seed"]]
            style = {"color": f"C{colour % 10}", "linewidth": 2.0 if name == "losia" else 0.8, "label": _quality_name(name)}
            rates.plot([r["gain"] for r in first], [r["forgetting"] for r in first], "o-", markersize=3, **style)
        rates.set_xlabel("held-out gain, nats per token, at the learning rates of the search")
        rates.set_ylabel("loss gained on unrelated text")
        rates.legend(fontsize=6)
    return figure


def _quality_name(name: str) -> str:
    names = {"losia": "LoSiA", "losia_published": "LoSiA as published", "lora": "LoRA", "dora": "DoRA", "galore": "GaLore"}
    return names.get(name, name)


FIGURES: dict[str, Callable[[Any], Any]] = {
    "step_time": _step_time,
    "memory": _memory,
    "communication": _communication,
    "growth": _growth,
    "quality": _quality,
}


def _panels(entries: Sequence[Any]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * max(1, min(2, len(entries))), 3.2 * -(-len(entries) // 2)))
    columns = min(2, len(entries))
    return figure, [figure.add_subplot(-(-len(entries) // 2), columns, place + 1) for place in range(len(entries))]


def _bars(axis: Any, found: list[tuple[str, float]], errors: Any = None) -> None:
    colours = [_OURS if name.startswith("LoSiA") else _OTHERS for name, _ in found]
    axis.barh([name for name, _ in found], [value for _, value in found], xerr=errors, color=colours)


if __name__ == "__main__":
    main()
