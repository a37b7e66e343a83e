"""Figures of what was measured over the steps: losses, learning rates, gradient norm, speed, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from losia_dist.tools.report.drawing import COLUMNS, ROWS, Picture, new_figure
from losia_dist.tools.report.run_directory import Run
from losia_dist.tools.report.series import Curve

_STEP = "optimizer step"
_TALL = 4.2  # inches: of figures with two parts, and of those beside them
_MEMORY_OF = {
    "device": "Memory that torch allocated on a GPU at most so far",
    "process": "Memory of a process (there is no GPU) at most so far",
}


def draw_learning(run: Run) -> list[Picture]:
    """Losses and learning rates, as far as the run logged them."""
    draw_rates = _rates if run.curves.rates and not _all_as_scheduled(run) else _scheduled_rate
    return [picture for picture in (_losses(run), draw_rates(run)) if picture is not None]


def _all_as_scheduled(run: Run) -> bool:
    """No layer rewarmed at any logged step: one curve says it all."""
    scheduled = run.curves.rate.points
    logged = [(scheduled.get(step), rate) for curve in run.curves.rates.values() for step, rate in curve.points.items()]
    return all(wanted is not None and math.isclose(rate, wanted, rel_tol=1e-4) for wanted, rate in logged)


def draw_measurements(run: Run) -> list[Picture]:
    """Gradient norm, speed and memory, as far as the run logged them."""
    options, curves = run.facts.get("options"), run.curves
    limit = options.get("max_grad_norm") if isinstance(options, dict) else None
    limit = float(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) else 0.0
    norm = "Of everything that trains, over all ranks, before clipping." + (f" Clipped to {limit:g}." if limit else "")
    speed = "Of all ranks, padding included: the mean from the run's start on."
    memory = _MEMORY_OF.get(str(run.facts.get("memory_of")), "Memory at most so far")
    memory += ". Training script: the largest of all ranks; Trainer: the first rank."
    trained = "Share of all experts that a token reached since the line before."
    busiest = "Tokens of the busiest expert as a multiple of its layer's mean, where that is largest. 1 is even."
    measured = [
        (curves.grad_norm, "gradient_norm", "Gradient norm", norm, "norm", limit),
        (curves.tokens_per_second, "tokens_per_second", "Tokens per second", speed, "tokens/s", 0.0),
        (curves.memory, "memory", "Peak memory", memory, "GB (10⁹ bytes)", 0.0),
        (curves.experts_trained, "experts_trained", "Experts that trained", trained, "share", 0.0),
        (curves.experts_busiest, "experts_busiest", "Balance of experts", busiest, "x mean", 0.0),
    ]
    return [_measured(*row) for row in measured if row[0]]


def draw_comparison(runs: Sequence[Run]) -> list[Picture]:
    """Losses of several runs in one figure: training on top, held-out below, where there is any."""
    kinds = {
        "training loss": [[run.curves.loss] for run in runs],
        "held-out loss": [[*run.curves.held_out.values()] for run in runs],
    }
    kinds = {name: curves for name, curves in kinds.items() if any(map(any, curves))}
    if not kinds:
        return []
    figure, axes = new_figure(1.0 + 2.4 * len(kinds), width=9.0, nrows=len(kinds), sharex=True, squeeze=False)
    for axis, (name, curves) in zip(axes[:, 0], kinds.items(), strict=True):
        mark = "o-" if name == "held-out loss" else "-"
        for place, run in enumerate(runs):
            for number, curve in enumerate(filter(None, curves[place])):
                label = "_" * (number > 0) + run.name  # once in the legend
                _plot(axis, curve, mark, color=f"C{place}", label=label, markersize=4)
        axis.set_ylabel(name)
        axis.legend()
    axes[-1, 0].set_xlabel(_STEP)
    caption = "Nats a token. Runs that saw other data, or other held-out data, cannot be compared by these numbers."
    alt = f"Training and held-out loss over steps of the runs {', '.join(run.name for run in runs)}."
    return [Picture("comparison", "Losses of all runs", caption, alt, figure, wide=True)]


def _losses(run: Run) -> Picture | None:
    drawn = {"training": run.curves.loss} if run.curves.loss else {}
    drawn |= run.curves.held_out
    if not drawn:
        return None
    figure, axis = new_figure(_TALL)
    if run.curves.loss:
        _plot(axis, run.curves.loss, "-", color=ROWS, label="training")
    for place, (name, curve) in enumerate(run.curves.held_out.items()):
        _plot(axis, curve, "o--", color=f"C{place + 1}", label=name, markersize=5)
    axis.set(xlabel=_STEP, ylabel="loss (nats a token)")
    axis.legend()
    caption = "Training: mean over all target tokens since the log line before. Held-out: the whole held-out set."
    ends = "; ".join(f"{name} {curve.values[0]:.3f} to {curve.last:.3f}" for name, curve in drawn.items())
    return Picture("loss", "Loss", caption, f"Loss over optimizer steps: {ends}.", figure)


def _rates(run: Run) -> Picture:
    """Of every group of layers over depth; in localization order where that is known."""
    rates, known = run.curves.rates, run.facts.get("groups")
    order = dict.fromkeys([*(known if isinstance(known, list) else run.movement.groups()), *rates])
    groups = [group for group in order if group in rates]
    steps = sorted({step for curve in rates.values() for step in curve.points})
    values_GS = np.array([[rates[group].points.get(step, np.nan) for step in steps] for group in groups])  # groups x steps
    figure, (above, below) = new_figure(_TALL, nrows=2, sharex=True, height_ratios=(1, 2.2))
    if run.curves.rate:
        _plot(above, run.curves.rate, "-", color=ROWS, label="scheduled")
    above.plot(steps, np.nanmin(values_GS, axis=0), "-", color=COLUMNS, label="lowest of all layers", linewidth=1.2)
    above.set_ylabel("learning rate")
    above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    above.legend(fontsize=8)
    # A step's column reaches back to the step before.
    edges = np.array([steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), *steps]) + 0.5
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
    figure, axis = new_figure(_TALL)
    _plot(axis, run.curves.rate, "-", color=ROWS)
    axis.set(xlabel=_STEP, ylabel="learning rate", ylim=(0, None))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    caption = "As scheduled." + (" Every layer was stepped with it." if run.curves.rates else "")
    return Picture("learning_rate", "Learning rate", caption, "Learning rate over optimizer steps.", figure)


def _measured(curve: Curve, name: str, title: str, caption: str, unit: str, limit: float) -> Picture:
    """limit: where a dashed line is drawn; 0: nowhere."""
    figure, axis = new_figure(2.4, width=4.3)  # three of them stand side by side
    _plot(axis, curve, "-", color=ROWS)
    if limit:
        axis.axhline(limit, color=COLUMNS, linestyle="--", linewidth=1.2)
    highest = max([limit, *(value for value in curve.values if np.isfinite(value))])
    axis.set(xlabel=_STEP, ylabel=unit, ylim=(0, 1.08 * highest or 1.0))
    return Picture(name, title, caption, f"{title} over optimizer steps, {curve.last:,.4g} at the end.", figure)


def _plot(axis: Any, curve: Curve, mark: str, **settings: Any) -> None:
    values = np.array(curve.values, dtype=float)
    if len(values) == 1 and "o" not in mark:
        mark = "o"  # a line through one point is not seen
    axis.plot(curve.steps, np.where(np.isfinite(values), values, np.nan), mark, **settings)
