"""Figures of what was measured over the steps: losses, learning rates, gradient norm, speed, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from losia_dist.reporting.drawing import COLUMNS, ROWS, SEVERAL, Picture, new_figure, style
from losia_dist.reporting.run import Run
from losia_dist.reporting.series import Curve

_STEP = "optimizer step"
_TALL = 4.2  # inches: of figures with two parts, and of those beside them


def draw_learning(run: Run) -> list[Picture]:
    """Losses and learning rates, as far as the run logged them."""
    with style():
        return [picture for picture in (_losses(run), _rates(run)) if picture is not None]


def draw_measurements(run: Run) -> list[Picture]:
    """Gradient norm, speed and memory, as far as the run logged them."""
    with style():
        return [picture for picture in (_gradient_norm(run), _speed(run), _memory(run)) if picture is not None]


def draw_comparison(runs: Sequence[Run]) -> Picture | None:
    """Losses of several runs in one figure: training on top, held-out below, where there is any."""
    kinds = [("training loss", lambda run: [run.curves.loss]), ("held-out loss", lambda run: [*run.curves.held_out.values()])]
    kinds = [(name, of) for name, of in kinds if any(any(of(run)) for run in runs)]
    if not kinds:
        return None
    with style():
        figure, axes = new_figure(1.0 + 2.4 * len(kinds), width=9.0, nrows=len(kinds), sharex=True, squeeze=False)
        for axis, (name, of) in zip(axes[:, 0], kinds, strict=True):
            for place, run in enumerate(runs):
                for curve in filter(None, of(run)):
                    mark = "o-" if name == "held-out loss" else "-"
                    _plot(axis, curve, mark, color=SEVERAL[place % len(SEVERAL)], label=run.name, markersize=4)
            axis.set_ylabel(name)
            _legend_once(axis)
        axes[-1, 0].set_xlabel(_STEP)
    names = ", ".join(run.name for run in runs)
    return Picture(
        "comparison",
        "Losses of all runs",
        "Nats a token. Runs that saw other data, or other held-out data, cannot be compared by these numbers.",
        f"Training and held-out loss over steps of the runs {names}.",
        figure,
        wide=True,
    )


def _losses(run: Run) -> Picture | None:
    if not run.curves.loss and not run.curves.held_out:
        return None
    figure, axis = new_figure(_TALL)
    if run.curves.loss:
        _plot(axis, run.curves.loss, "-", color=ROWS, label="training")
    for place, (name, curve) in enumerate(run.curves.held_out.items()):
        _plot(axis, curve, "o--", color=SEVERAL[1 + place % (len(SEVERAL) - 1)], label=name, markersize=5)
    axis.set(xlabel=_STEP, ylabel="loss (nats a token)")
    axis.legend()
    ends = "; ".join(f"{n} {c.values[0]:.3f} to {c.last:.3f}" for n, c in _named_losses(run))
    return Picture(
        "loss",
        "Loss",
        "Training: mean over all target tokens since the log line before. Held-out: the whole held-out set.",
        f"Loss over optimizer steps: {ends}.",
        figure,
    )


def _named_losses(run: Run) -> list[tuple[str, Curve]]:
    training = [("training", run.curves.loss)] if run.curves.loss else []
    return training + list(run.curves.held_out.items())


def _rates(run: Run) -> Picture | None:
    rates = run.curves.rates
    if not rates:
        return _scheduled_rate(run)
    steps = sorted({step for curve in rates.values() for step in curve.points})
    groups = _by_depth(run)
    values_GS = np.array([[rates[group].points.get(step, np.nan) for step in steps] for group in groups])  # groups x steps
    figure, (above, below) = new_figure(_TALL, nrows=2, sharex=True, height_ratios=(1, 2.2))
    if run.curves.rate:
        _plot(above, run.curves.rate, "-", color=ROWS, label="scheduled")
    lowest = np.nanmin(values_GS, axis=0)
    above.plot(steps, lowest, "-", color=COLUMNS, label="lowest of all layers", linewidth=1.2)
    above.set_ylabel("learning rate")
    above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    above.legend(fontsize=8)
    edges = _edges(steps)
    below.grid(False)
    image = below.pcolormesh(edges, np.arange(len(groups) + 1) - 0.5, values_GS, cmap="viridis", vmin=0, rasterized=True)
    below.set(xlabel=_STEP, ylabel="layer (by depth)", ylim=(len(groups) - 0.5, -0.5))
    below.yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=below, pad=0.01, aspect=18)
    bar.formatter.set_powerlimits((-2, 3))
    return Picture(
        "learning_rate",
        "Learning rate of every layer",
        "As each layer was really stepped. Dark notches: a layer has just got a new subnet, and its rate rewarms. Only steps "
        "with a log line are seen.",
        f"Learning rate of {len(groups)} groups of layers over optimizer steps, with rewarming.",
        figure,
    )


def _scheduled_rate(run: Run) -> Picture | None:
    if not run.curves.rate:
        return None
    figure, axis = new_figure()
    _plot(axis, run.curves.rate, "-", color=ROWS)
    axis.set(xlabel=_STEP, ylabel="learning rate", ylim=(0, None))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return Picture("learning_rate", "Learning rate", "As scheduled.", "Learning rate over optimizer steps.", figure)


def _by_depth(run: Run) -> list[str]:
    """Groups with a learning rate, in localization order where that is known."""
    known = run.facts.get("groups")
    order = [str(group) for group in known] if isinstance(known, list) else run.movement.groups()
    return [group for group in order if group in run.curves.rates] + [g for g in run.curves.rates if g not in order]


def _gradient_norm(run: Run) -> Picture | None:
    limit = _number(_options(run).get("max_grad_norm"))
    note = f" Clipped to {limit:g}." if limit else ""
    return _simple(
        run.curves.grad_norm,
        "gradient_norm",
        "Gradient norm",
        f"Of everything that trains, over all ranks, before clipping.{note}",
        "norm",
        line=limit or None,
    )


def _speed(run: Run) -> Picture | None:
    caption = "Of all ranks, padding included: the mean from the run's start on."
    return _simple(run.curves.tokens_per_second, "tokens_per_second", "Tokens per second", caption, "tokens/s")


def _memory(run: Run) -> Picture | None:
    of = {
        "device": "Memory that torch allocated on a GPU at most so far",
        "process": "Memory of a process (there is no GPU) at most so far",
    }.get(str(run.facts.get("memory_of")), "Memory at most so far")
    caption = f"{of}. Training script: the largest of all ranks; Trainer: the first rank."
    return _simple(run.curves.memory, "memory", "Peak memory", caption, "GB (10⁹ bytes)")


def _simple(curve: Curve, name: str, title: str, caption: str, unit: str, line: float | None = None) -> Picture | None:
    if not curve:
        return None
    figure, axis = new_figure(2.4, width=4.3)  # three of them stand side by side
    _plot(axis, curve, "-", color=ROWS)
    if line is not None:
        axis.axhline(line, color=COLUMNS, linestyle="--", linewidth=1.2)
    highest = np.nanmax([v for v in curve.values if np.isfinite(v)] or [1.0])
    axis.set(xlabel=_STEP, ylabel=unit, ylim=(0, 1.08 * max(highest, line or 0.0) or 1.0))
    return Picture(name, title, caption, f"{title} over optimizer steps, {curve.last:,.4g} at the end.", figure)


def _plot(axis: Any, curve: Curve, mark: str, **settings: Any) -> None:
    values = np.array(curve.values, dtype=float)
    if len(values) == 1 and "o" not in mark:
        mark = "o"  # a line through one point is not seen
    axis.plot(curve.steps, np.where(np.isfinite(values), values, np.nan), mark, **settings)


def _edges(steps: Sequence[int]) -> list[float]:
    """Bounds of the steps' columns in a map: each column reaches back to the step before."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return [float(edge) + 0.5 for edge in [first, *steps]]


def _legend_once(axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    axis.legend([first[label] for label in dict.fromkeys(labels)], list(dict.fromkeys(labels)))


def _options(run: Run) -> dict[str, Any]:
    options = run.facts.get("options")
    return options if isinstance(options, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
