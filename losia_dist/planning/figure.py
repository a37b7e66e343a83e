"""Memory of one GPU as a picture: one bar a method, cut by what the bytes are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from losia_dist.errors import ConfigError
from losia_dist.planning.memory import PARTS
from losia_dist.planning.plan import Plan
from losia_dist.planning.workload import GB


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Write the picture; its format follows the file's ending (.png, .svg, .pdf).

    Raises:
        ConfigError: matplotlib is not installed, an unknown ending, or a file that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--figure needs matplotlib: pip install 'losia_dist[report]'.") from error
    figure = Figure(figsize=(8, 1.4 + 0.6 * len(plans)), layout="constrained")
    axes = figure.subplots()
    names = [plan.workload.method for plan in plans]
    left = [0.0] * len(plans)
    for part in PARTS:
        widths = [plan.memory.parts[part] / GB for plan in plans]
        if any(widths):
            axes.barh(names, widths, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    workload = plans[0].workload
    axes.axvline(workload.cluster.memory / GB, color="black", linestyle="--", label="one GPU")
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.set_title(f"{workload.shape.name}, {workload.engine}, {workload.cluster.gpus} GPUs, {workload.sequence} tokens")
    axes.legend(fontsize="small", ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--figure {path} cannot be written: {error}.") from error
