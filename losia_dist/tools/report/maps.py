"""Figures of the subnets: which neurons were chosen at which depth, how they moved, and how much importance they hold.

Dimensions: G groups of layers by depth, K kinds of layers, B bins over neuron positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losia_dist.digits import short
from losia_dist.tools.report.drawing import CHANCE, COLUMNS, ROWS, Picture, new_figure
from losia_dist.tools.report.movement import Indices, Layer, Move, Movement
from losia_dist.tools.report.run_directory import Run

_MOST_BINS = 400  # of a map; a wider layer's neurons are counted together
_STAYED, _JOINED, _LEFT = np.array([[0.08, 0.25, 0.55], [0.86, 0.42, 0.05], [0.72, 0.75, 0.79]])
STAYED, JOINED, LEFT = ("#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in colour)) for colour in (_STAYED, _JOINED, _LEFT))


def draw_importance(run: Run) -> list[Picture]:
    """Share of importance captured, over the steps and by kind and depth; nothing where it was not measured."""
    measured = [move for move in run.movement.moves if move.captured is not None]
    return [_captured_over_steps(measured), _captured_by_layer(run.movement)] if measured else []


def draw_coverage(run: Run) -> list[Picture]:
    """How much of each weight has been in a subnet: over the steps, and by kind and depth."""
    moves, movement = run.movement.moves, run.movement
    if not moves:
        return []
    figure, axis = new_figure()
    _marks(axis, moves, 100 * np.array([move.covered for move in moves]), (0.25, 3.5), marker="o", color=ROWS)
    axis.set(xlabel="optimizer step", ylabel="% of the weight", ylim=(0, 105))
    latest = 100 * np.array([layer.covered for layer in movement.layers.values()])
    over_steps = Picture(
        "coverage",
        "Trained so far",
        "Share of a weight that has been in a subnet by then. Small marks: single layers when their subnet moves; large: mean "
        "of those of a step.",
        f"Share of the weights that has trained: {latest.mean():.1f} % on average at the end, {latest.min():.1f} % at least.",
        figure,
    )
    shares = {(layer.kind, layer.group): 100 * layer.covered for layer in movement.layers.values()}
    by_layer = _by_layer(movement, shares)
    caption = "Of each layer, at the end of the logs. Layers that lag behind have moved less often."
    alt = f"Share that has trained for {len(movement.kinds())} kinds of linear layers over {len(movement.groups())} depths."
    return [over_steps, Picture("coverage_by_layer", "Trained so far, by layer", caption, alt, by_layer)]


def draw_movement(run: Run) -> list[Picture]:
    """Overlap of successive subnets over the steps, and for each kind of layer a map of what was chosen."""
    moved = [move for move in run.movement.moves if move.overlap is not None]
    overlap = [_overlap(moved)] if moved else []
    maps = [_map(run.movement, kind) for kind in run.movement.kinds()]
    return overlap + [picture for picture in maps if picture is not None]


def mean_captured(moves: Sequence[Move]) -> float | None:
    """Mean share over moves with a measured one."""
    shares = [move.captured for move in moves if move.captured is not None]
    return float(np.mean(shares)) if shares else None


def _captured_over_steps(moves: list[Move]) -> Picture:
    figure, axis = new_figure()
    for reason, label, colour, marker in (
        ("located", "located before the first step", COLUMNS, "s"),
        ("relocalized", "re-localized", ROWS, "o"),
    ):
        chosen = [move for move in moves if move.reason == reason]
        if chosen:
            shares = np.array([100 * (move.captured or 0.0) for move in chosen])
            _marks(axis, chosen, shares, (0.35, 4), marker=marker, color=colour, label=f"{label}: mean of a step")
    chance = 100 * float(np.mean([move.layer.random_share for move in moves]))
    axis.axhline(chance, color=CHANCE, linestyle="--", linewidth=1.4, label=f"a random subnet: {short(chance, 2)} %")
    axis.set(xlabel="optimizer step", ylabel="% of the layer's importance", ylim=(0, None))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1)  # above: the marks are everywhere
    mean = 100 * (mean_captured(moves) or 0.0)
    return Picture(
        "importance_captured",
        "Importance captured",
        "Share of all importance of a linear layer that lay inside the subnet just chosen. Small marks: single layers. Dashed: "
        "what a random subnet of the same size holds on average.",
        f"Importance captured by chosen subnets: {mean:.1f} % on average, {short(chance, 2)} % by a random one.",
        figure,
    )


def _marks(axis: Any, moves: list[Move], shares: NDArray[Any], small: tuple[float, float], **settings: Any) -> None:
    """A small mark for each move, of this opacity and size, and a line of the steps' means."""
    at, (alpha, size) = np.array([move.step for move in moves]), small
    axis.plot(at, shares, linestyle="", alpha=alpha, markersize=size, markeredgewidth=0, **{**settings, "label": None})
    steps = np.unique(at)
    axis.plot(steps, [shares[at == step].mean() for step in steps], markersize=6, linewidth=1.2, **settings)


def _by_layer(movement: Movement, shares: dict[tuple[str, str], float]) -> Any:
    """A figure of percentages by (kind, group)."""
    groups, kinds = movement.groups(), movement.kinds()
    shares_KG = np.full((len(kinds), len(groups)), np.nan)
    for (kind, group), share in shares.items():
        shares_KG[kinds.index(kind), groups.index(group)] = share
    figure, axis = new_figure(1.5 + 0.24 * len(kinds))
    axis.grid(False)
    image = axis.imshow(shares_KG, aspect="auto", cmap="viridis", vmin=0)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axis.set_xlabel("layer (by depth)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, pad=0.01, label="%")
    return figure


def _captured_by_layer(movement: Movement) -> Picture:
    known = [layer for layer in movement.layers.values() if layer.captured is not None]
    figure = _by_layer(movement, {(layer.kind, layer.group): 100 * (layer.captured or 0.0) for layer in known})
    return Picture(
        "importance_by_layer",
        "Importance captured, by layer",
        "Of each layer's latest subnet. The more it holds, the more concentrated the layer's importance is.",
        f"Share of importance captured for {len(movement.kinds())} kinds of layers over {len(movement.groups())} depths.",
        figure,
    )


def _overlap(moves: list[Move]) -> Picture:
    figure, axes = new_figure(4.0, nrows=2, sharex=True)
    means = []
    for place, (label, colour) in enumerate((("rows (output neurons)", ROWS), ("columns (input neurons)", COLUMNS))):
        axis = axes[place]
        axis.set(ylabel="% that stay", ylim=(0, 105))
        axis.set_title(label, fontsize=10, loc="left")
        partial = [m for m in moves if m.layer.taken[place] < m.layer.shape[place]]  # where all are taken, none can move
        if not partial:
            axis.text(0.5, 0.5, "all of them train", transform=axis.transAxes, ha="center", color=CHANCE)
            continue
        shares = np.array([100 * move.overlap[place] for move in partial if move.overlap is not None])
        _marks(axis, partial, shares, (0.25, 3.5), marker="o", color=colour)
        chance = 100 * float(np.mean([m.layer.taken[place] / m.layer.shape[place] for m in partial]))
        axis.axhline(chance, color=CHANCE, linestyle="--", linewidth=1.4)
        means.append(f"{label}: {shares.mean():.0f} % stay on average, {short(chance, 2)} % by chance")
    axes[-1].set_xlabel("optimizer step")
    return Picture(
        "overlap",
        "Overlap of successive subnets",
        "Share of a new subnet's neurons that the layer's subnet before it held too. Small marks: single layers; large: mean "
        "of a step; dashed: what two independent random choices share.",
        f"Overlap of successive subnets. {'; '.join(means)}.",
        figure,
    )


def _map(movement: Movement, kind: str) -> Picture | None:
    layers, groups = movement.of_kind(kind), movement.groups()
    names = ("output neurons (rows)", "input neurons (columns)")
    sides = [place for place in (0, 1) if any(layer.taken[place] < layer.shape[place] for layer in layers)]
    if not sides:
        return None
    shown = [group for group in groups if any(layer.group == group for layer in layers)]
    figure, axes = new_figure(1.1 + len(sides) * (0.85 + min(2.2, 0.035 * len(shown))), nrows=len(sides), squeeze=False)
    for axis, place in zip(axes[:, 0], sides, strict=True):
        width = max(layer.shape[place] for layer in layers)
        axis.grid(False)
        for spine in ("top", "right"):
            axis.spines[spine].set_visible(True)
        colours_GB = np.ones((len(shown), _bins(width), 3))
        for layer in layers:
            colours_GB[shown.index(layer.group)] = _strip(layer, place, width)
        axis.imshow(colours_GB, aspect="auto", extent=(0, width, len(shown) - 0.5, -0.5))
        axis.set(xlabel=names[place], ylabel="depth")
        axis.yaxis.get_major_locator().set_params(integer=True)
    (m, n), (r, c) = layers[-1].shape, layers[-1].taken
    return Picture(
        f"map_{kind.replace('.', '_')}",
        kind,
        f"{m:,} output and {n:,} input neurons, of which {r:,} and {c:,} are chosen.",
        f"Map of the neurons chosen in {kind}, by depth and position: first choice against the latest.",
        figure,
    )


def _bins(width: int) -> int:
    return -(-width // -(-width // _MOST_BINS))


def _strip(layer: Layer, place: int, width: int) -> NDArray[Any]:
    """Colours [B, 3] of one layer: hue by what stayed, joined and left, strength by how many of a bin's neurons did."""
    first, latest = layer.first[place], layer.latest[place]
    per_bin, count = -(-width // _bins(width)), _bins(width)

    def counted(indices: Indices) -> NDArray[Any]:
        return np.bincount(indices % layer.shape[place] // per_bin, minlength=count)[:count] / layer.count

    stayed = counted(np.intersect1d(first, latest, assume_unique=True))
    joined = counted(np.setdiff1d(latest, first, assume_unique=True))
    left = counted(np.setdiff1d(first, latest, assume_unique=True))
    total = stayed + joined + left
    mixed = stayed[:, None] * _STAYED + joined[:, None] * _JOINED + left[:, None] * _LEFT
    hue = mixed / np.maximum(total, 1 / layer.count)[:, None]
    # With many neurons in a bin hardly any bin is full: three times the mean is as strong as it gets.
    full = per_bin if per_bin == 1 else min(per_bin, max(1.0, 3 * per_bin * layer.taken[place] / layer.shape[place]))
    strength = np.minimum(1.0, total / full)[:, None]
    return 1.0 - strength * (1.0 - hue)
