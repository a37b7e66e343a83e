"""What a rank's memory is taken by: the tensors of each kind as the run counted them, and the rest of the measured peak."""

from __future__ import annotations

from collections.abc import Sequence

from losia_dist.digits import short
from losia_dist.tools.report.drawing import COLUMNS, INK, ROWS, Picture, new_figure
from losia_dist.tools.report.run_directory import Run

_KINDS = {
    "weights": ("weights that do not train", ROWS),
    "trained": ("what trains", COLUMNS),
    "optimizer": ("optimizer state", "#2a8c6a"),
    "importance": ("importance averages", "#8a4fbf"),
}
_REST = ("rest of the peak", "#c3c9d1")
HEAD = ["run", *(name for name, _ in _KINDS.values()), _REST[0], "peak", "on the host besides"]


def draw_memory(runs: Sequence[Run]) -> list[Picture]:
    """A bar for each run that counted its memory; nothing where none did."""
    counted = [run for run in runs if run.memory]
    if not counted:
        return []
    parts = [_parts(run) for run in counted]
    unit, name = _unit(max(sum(one.values()) for one in parts))
    figure, axis = new_figure(1.25 + 0.42 * len(counted), width=11.0)
    for place, one in enumerate(parts):
        start = 0.0
        for kind, (label, colour) in (*_KINDS.items(), ("rest", _REST)):
            width = one[kind] / unit
            axis.barh(place, width, left=start, height=0.62, color=colour, label="_" * (place > 0) + label)
            start += width
    axis.set_yticks(range(len(counted)), [run.name for run in counted] if len(counted) > 1 else [""])
    axis.invert_yaxis()
    axis.set_xlabel(name)
    axis.grid(False, axis="y")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(_KINDS) + 1, labelcolor=INK)
    rest = "activations, gradients, and what passes"
    if any(run.facts.get("memory_of") == "process" for run in counted):
        rest += "; of a process Python and its libraries too"
    caption = (
        "Of the first rank. Tensors of the first four kinds were counted between two steps; the rest is what was measured at "
        f"most, less these: {rest}."
    )
    sums = "; ".join(f"{run.name} {_shown(run.memory['peak'])}" for run in counted)
    alt = f"Memory of the first rank by kind; at most: {sums}."
    return [Picture("memory_by_kind", "Memory by kind", caption, alt, figure, wide=True)]


def memory_row(run: Run) -> list[str]:
    """A line of the table, under HEAD."""
    parts = _parts(run)
    peak = run.memory["peak"]
    held = [_shown(parts[kind]) for kind in _KINDS]
    host = run.memory["held"].get("host", 0)
    return [run.name, *held, _shown(parts["rest"]), _shown(peak), _shown(host) if host else "-"]


def _parts(run: Run) -> dict[str, int]:
    """Bytes by kind, and of the rest. A process may have tensors in memory that it never touched: then there is no rest."""
    parts = {kind: run.memory["held"][kind] for kind in _KINDS}
    return {**parts, "rest": max(0, run.memory["peak"] - sum(parts.values()))}


def _unit(most: int) -> tuple[float, str]:
    return (1e9, "GB (10⁹ bytes)") if most >= 2e8 else (1e6, "MB (10⁶ bytes)")


def _shown(size: int) -> str:
    unit, name = _unit(size)
    return f"{short(size / unit)} {name.split()[0]}"
