"""The HTML page: one file with nothing outside it, and nothing in it that runs. Its template is `page.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losia_dist.digits import short
from losia_dist.tools.report.drawing import Picture


@dataclass
class Section:
    """A part of the page, in the order of its fields; without anything to show it is left out.

    lead: plain text. key: (colour, what it means). small: more pictures side by side. head, rows: a table whose first column
    is text and whose others are numbers. samples: (name, text) of each sample answer. folded: title -> names and values.
    """

    title: str
    lead: str = ""
    key: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Picture] = ()
    small: bool = False
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    samples: Sequence[Sequence[tuple[str, Any]]] = ()
    folded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.pictures, self.rows, self.samples, *self.folded.values()))


def render(**values: Any) -> str:
    """The whole file. All text of the run is escaped, and the page's own rule lets a browser load nothing at all.

    Args:
        values: title, subtitle, notes, footer: plain text. tiles: (value, what it is). sections: of `Section`.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(values)


def shown(value: Any) -> str:
    """A value of a configuration, as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not set"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return short(value, 6)
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(one)}" for name, one in value.items()) or "none"
    return str(value)
