"""The HTML page: one file with nothing outside it, and nothing in it that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from losia_dist.digits import short
from losia_dist.reporting.drawing import Picture

_RULE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # load nothing, run nothing
_CSS = """
:root{color-scheme:light;--ink:#1f2933;--soft:#52606d;--line:#e4e7eb;--card:#fff;--ground:#f5f7fa;--accent:#1d5fbf}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.65rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 4px}
h3{font-size:1rem;margin:0 0 6px;overflow-wrap:anywhere}
p{margin:0 0 10px}
.sub,.lead,figcaption,footer{color:var(--soft)}
.sub{margin:6px 0 22px}
.lead{max-width:46rem;margin-bottom:14px}
figcaption,footer,.small{font-size:.86rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:12px}
.tile,figure,.box{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 14px}
.tile b{display:block;font-size:1.3rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.84rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
.grid.small-ones{grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
figure{margin:0;padding:14px 16px 12px}
figure.wide{grid-column:1/-1}
figure img{display:block;width:100%;height:auto}
figcaption{margin-top:6px}
.notes{border-left:4px solid #d9a514;background:#fff8e5;border-radius:6px;padding:10px 14px;margin:18px 0 0}
.notes p:last-child{margin:0}
.box{padding:12px 16px;margin:0 0 12px}
.grid+.box{margin-top:16px}
.box.scroll{overflow-x:auto}
summary{cursor:pointer;font-weight:600}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);font-size:.92rem}
tr:last-child th,tr:last-child td{border-bottom:0}
th{font-weight:500;color:var(--soft);white-space:nowrap}
td{overflow-wrap:anywhere}
thead th{white-space:normal}
td.n,th.n{text-align:right;white-space:nowrap}
.answer{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--ground);border-radius:6px;padding:8px 10px;
margin:4px 0 12px;font-size:.9rem}
.key i{display:inline-block;width:.85em;height:.85em;border-radius:3px;vertical-align:-.08em;margin:0 .3em 0 .9em}
.key i:first-child{margin-left:0}
footer{margin-top:44px;border-top:1px solid var(--line);padding-top:12px}
@media(max-width:560px){.tiles{grid-template-columns:1fr 1fr}}
@media print{body{background:#fff}main{max-width:none}figure,.box{break-inside:avoid}}
"""


@dataclass
class Section:
    """A part of the page. lead, key: before the pictures; key names colours. html: after them, made by this module.

    small: more pictures side by side.
    """

    title: str
    lead: str = ""
    key: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Picture] = ()
    html: str = ""
    small: bool = False

    def __bool__(self) -> bool:
        return bool(self.pictures or self.html)


@dataclass
class Page:
    """title, subtitle, notes, footer: plain text. tiles: (value, what it is)."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str]]
    notes: Sequence[str]
    sections: Sequence[Section]
    footer: str = ""
    pictures: list[Picture] = field(init=False)

    def __post_init__(self) -> None:
        self.pictures = [picture for section in self.sections for picture in section.pictures]

    def html(self) -> str:
        """The whole file. All text of the run is escaped, and the page's own rule lets a browser load nothing at all."""
        tiles = "".join(
            f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in self.tiles
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_RULE}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_CSS}</style></head>\n<body><main>"
            f"<h1>{escape(self.title)}</h1><p class=sub>{escape(self.subtitle)}</p>\n<div class=tiles>{tiles}</div>"
            + (f"<div class=notes>{notes}</div>" if notes else "")
            + "".join(_section(section) for section in self.sections if section)
            + f"\n<footer>{escape(self.footer)}</footer></main></body></html>\n"
        )


def table(rows: Mapping[str, Any], title: str = "", is_open: bool = True) -> str:
    """Names and values; with a title, one that can be folded."""
    body = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(shown(value))}</td></tr>" for name, value in rows.items())
    inner = f"<table><tbody>{body}</tbody></table>"
    return _folded(title, inner, is_open) if title else f"<div class='box scroll'>{inner}</div>"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head; the first column is text, the others are numbers."""
    cells = [f"<th{_right(place)}>{escape(name)}</th>" for place, name in enumerate(head)]
    body = "".join(
        "<tr>" + "".join(f"<td{_right(place)}>{escape(cell)}</td>" for place, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<div class='box scroll'><table><thead><tr>{''.join(cells)}</tr></thead><tbody>{body}</tbody></table></div>"


def answers(before: Sequence[Any], after: Sequence[Any]) -> str:
    """Sample answers before and after training; pairs by place, and what lacks its prompt or answer is left out."""
    parts = []
    for place, sample in enumerate(after):
        if not isinstance(sample, dict) or not {"prompt", "answer"} <= set(sample):
            continue
        texts = [("Prompt", sample["prompt"])]
        if place < len(before) and isinstance(before[place], dict) and "answer" in before[place]:
            texts.append(("Before training", before[place]["answer"]))
        texts.append(("After training", sample["answer"]))
        if "expected" in sample:
            texts.append(("Expected", sample["expected"]))
        parts.append(
            "<div class=box>"
            + "".join(f"<h3>{name}</h3><div class=answer>{escape(str(text))}</div>" for name, text in texts)
            + "</div>"
        )
    return "".join(parts)


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


def _section(section: Section) -> str:
    grid = '"grid small-ones"' if section.small else "grid"
    key = "".join(f'<i style="background:{colour}"></i>{escape(name)}' for colour, name in section.key)
    return (
        f"\n<section><h2>{escape(section.title)}</h2>"
        + (f"<p class=lead>{escape(section.lead)}</p>" if section.lead else "")
        + (f'<p class="key small">{key}</p>' if key else "")
        + (f"<div class={grid}>{''.join(map(_figure, section.pictures))}</div>" if section.pictures else "")
        + section.html
        + "</section>"
    )


def _figure(picture: Picture) -> str:
    kind = " class=wide" if picture.wide else ""
    return (
        f'<figure{kind}><h3>{escape(picture.title)}</h3><img alt="{escape(picture.alt)}" src="{picture.svg()}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _folded(title: str, inner: str, is_open: bool) -> str:
    return f"<details class='box scroll'{' open' if is_open else ''}><summary>{escape(title)}</summary>{inner}</details>"


def _right(place: int) -> str:
    return " class=n" if place else ""
