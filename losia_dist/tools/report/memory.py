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
    """A bar for each run that counted its memory; nothing where none did. The rest of a process is mostly Python, which would
    dwarf a small model: it stands in the table alone."""
    counted = [run for run in runs if run.memory]
    if not counted:
        return []
    on_devices = all(run.facts.get("memory_of") == "device" for run in counted)
    drawn = {**_KINDS, "rest": _REST} if on_devices else _KINDS
    parts = [_parts(run) for run in counted]
    drawn = {kind: of for kind, of in drawn.items() if any(one[kind] for one in parts)}
    unit, name = _unit(max(sum(one[kind] for kind in drawn) for one in parts))
    figure, axis = new_figure(1.25 + 0.42 * len(counted), width=11.0)
    for place, one in enumerate(parts):
        start = 0.0
        for kind, (label, colour) in drawn.items():
            axis.barh(place, one[kind] / unit, left=start, height=0.62, color=colour, label="_" * (place > 0) + label)
            start += one[kind] / unit
    several = len(counted) > 1
    axis.set_yticks(range(len(counted)) if several else [], [run.name for run in counted] if several else [])
    axis.invert_yaxis()
    axis.set_xlabel(f"{name} (10{_POWERS[name]} bytes)")
    axis.grid(False, axis="y")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(drawn), labelcolor=INK)
    rest = f"{'' if on_devices else 'Python, its libraries, '}activations, gradients and what passes"
    caption = (
        "Of the first rank. Tensors of these kinds were counted between two steps. The rest of the peak is what was measured "
        f"at most, less these: {rest}."
    )
    sums = "; ".join(f"{run.name} {_shown(run.memory['peak'])}" for run in counted)
    alt = f"Memory of the first rank by kind; at most: {sums}."
    return [Picture("memory_by_kind", "Memory by kind", caption, alt, figure, wide=True)]


def memory_row(run: Run) -> list[str]:
    """A line of the table, under HEAD."""
    parts = _parts(run)
    sizes = [*(parts[kind] for kind in _KINDS), parts["rest"], run.memory["peak"], run.memory["held"].get("host", 0)]
    return [run.name, *map(_shown, sizes)]


def _parts(run: Run) -> dict[str, int]:
    """Bytes by kind, and of the rest. A process may have tensors in memory that it never touched: then there is no rest."""
    parts = {kind: run.memory["held"][kind] for kind in _KINDS}
    return {**parts, "rest": max(0, run.memory["peak"] - sum(parts.values()))}


_POWERS = {"GB": "\u2079", "MB": "\u2076", "kB": "\u00b3"}


def _unit(most: int) -> tuple[float, str]:
    return (1e9, "GB") if most >= 1e8 else (1e6, "MB") if most >= 1e5 else (1e3, "kB")


def _shown(size: int) -> str:
    unit, name = _unit(size)
    return f"{short(size / unit)} {name}" if size else "-"
