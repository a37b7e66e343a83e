"""How figures look, and how they become SVG (in the page) and PNG (beside it). Only here and in the figures is matplotlib."""

from __future__ import annotations

import base64
import io
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from losia_dist.errors import ConfigError

ROWS, COLUMNS, CHANCE, INK = "#1d5fbf", "#c65d0e", "#6b7280", "#1f2933"
# Small enough to be read on a telephone, where the page scales it down but a little.
WIDTH, HEIGHT = 5.6, 3.1  # inches
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "image.interpolation": "none",
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "losia_dist",
}


@dataclass
class Picture:
    """A figure of the page. name: of its PNG. title, caption: plain text. alt: what it shows, for those who do not see it."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Any
    wide: bool = False

    def svg(self) -> str:
        """As a data address for an <img>."""
        drawn = self._saved(format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode("ascii")

    def png(self) -> bytes:
        """160 dots an inch."""
        return self._saved(format="png", dpi=160)

    def _saved(self, **options: Any) -> bytes:
        target = io.BytesIO()
        self.figure.savefig(target, **options)
        return target.getvalue()


def style() -> AbstractContextManager[None]:
    """The settings of matplotlib while figures are drawn and saved; those of the process are put back.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("losia-dist report needs matplotlib: pip install 'losia_dist[report]'.") from error
    return matplotlib.rc_context(_STYLE)


def new_figure(height: float = HEIGHT, width: float = WIDTH, **subplots: Any) -> tuple[Any, Any]:
    """A figure and its axes, under `style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)
