"""From a run's directory to its page: what is shown, and in which order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from losia_dist._version import __version__
from losia_dist.digits import percent
from losia_dist.errors import ConfigError
from losia_dist.reporting import maps
from losia_dist.reporting.curves import draw_comparison, draw_learning, draw_measurements
from losia_dist.reporting.drawing import check_matplotlib
from losia_dist.reporting.page import Page, Section, answers, columns, table
from losia_dist.reporting.run import Run, read_run

_SAMPLES = ("samples_before", "samples_after")


def write_report(directory: Path, output: Path, png: Path | None = None, compare: Sequence[Path] = ()) -> list[Path]:
    """Write the page, and with `png` every figure of it as a PNG into that directory. One process; no GPU.

    Args:
        directory: of the run; it may still be going on.
        output: the HTML file; its directory is made if missing.
        compare: directories of further runs, whose losses are drawn beside this one's.

    Returns:
        the files written, the page first.

    Raises:
        ConfigError: matplotlib is missing, a directory is no run's, or a file cannot be written.
    """
    check_matplotlib()
    if output.is_dir():
        raise ConfigError(f"--output {output} is a directory: give the name of an HTML file.")
    runs = [read_run(one) for one in (directory, *compare)]
    _name_apart(runs)
    page = make_page(runs[0], runs[1:])
    written = [_write(output, page.html().encode("utf-8"), "--output")]
    if png is not None:
        written += [_write(png / f"{picture.name}.png", picture.png(), "--png") for picture in page.pictures]
    return written


def make_page(run: Run, others: Sequence[Run] = ()) -> Page:
    """Draw everything that the run has logged."""
    moved = Section(
        "Where the subnets are, and how they move",
        "Each map shows a kind of linear layer: one line for each depth, and neurons by their position from left to right (in "
        "wide layers several to a dot).",
        key=(
            (maps.STAYED, "in the first subnet and in the latest"),
            (maps.JOINED, "only in the latest"),
            (maps.LEFT, "only in the first"),
        ),
        pictures=maps.draw_movement(run),
        html=_kinds(run),
    )
    comparison = draw_comparison([run, *others]) if others else None
    sections = [
        Section("Training", pictures=draw_learning(run)),
        Section("Gradient norm, speed and memory", pictures=draw_measurements(run), small=True),
        Section(
            "How much importance the subnets hold",
            "Measured when a subnet is chosen: importance inside it over that of the whole layer.",
            pictures=maps.draw_importance(run),
        ),
        moved,
        Section("Comparison", pictures=[comparison] if comparison else [], html=_compared([run, *others]) if others else ""),
        Section("Answers", "To held-out prompts, greedily.", html=answers(*(_list(run.summary.get(key)) for key in _SAMPLES))),
        Section("Configuration and versions", html=_settings(run)),
    ]
    return Page(
        title=f"LoSiA run {run.name}" if run.fact("method") != "full" else f"Full fine-tuning run {run.name}",
        subtitle=_subtitle(run),
        tiles=_tiles(run),
        notes=run.notes,
        sections=sections,
        footer=f"Made by losia-dist report {__version__} from {', '.join(run.files)}.",
    )


def _subtitle(run: Run) -> str:
    ranks, steps = run.fact("ranks"), run.fact("steps")
    parts = [
        str(run.fact("engine") or ""),
        str(run.fact("precision") or ""),
        f"{ranks} rank{'' if ranks == 1 else 's'}" if ranks else "",
        f"{steps:,} steps" if isinstance(steps, int) else "",
        str(run.facts.get("device") or ""),
        str(run.facts.get("begun") or "").replace("T", " ").replace("+00:00", " UTC"),
    ]
    return " · ".join(part for part in parts if part)


def _tiles(run: Run) -> list[tuple[str, str]]:
    curves, tiles = run.curves, []
    for name, curve in curves.held_out.items():
        what = "held-out loss" if name == "held-out" else f"held-out loss, {name}"
        values = curve.values
        tiles.append((f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[0]:.3f}", what))
    if curves.loss:
        tiles.append((f"{curves.loss.last:.3f}", "training loss at the end"))
    trainable = run.fact("trainable_parameters")
    if isinstance(trainable, int):
        tiles.append((f"{trainable:,}", "parameters that train"))
    seconds = run.summary.get("training_seconds")
    if isinstance(seconds, int | float):
        tiles.append((_duration(float(seconds)), "of training"))
    if curves.tokens_per_second:
        tiles.append((f"{curves.tokens_per_second.last:,.0f}", "tokens per second"))
    if curves.memory:
        tiles.append((f"{curves.memory.last:.2f} GB", "peak memory of a rank"))
    relocalized = [move for move in run.movement.moves if move.reason == "relocalized"]
    if run.movement.layers:
        moved = len({move.layer.name for move in relocalized})
        tiles.append(
            (
                f"{moved} of {len(run.movement.layers)}",
                "linear layers drawn anew" if run.config.get("selection") == "random" else "linear layers re-localized",
            )
        )
    measured = [move for move in run.movement.moves if move.captured is not None]
    captured = maps.mean_captured(measured)
    if captured is not None:
        chance = float(np.mean([move.layer.random_share for move in measured]))
        tiles.append((f"{100 * captured:.0f} %", f"of importance captured; a random subnet {percent(chance)}"))
    return tiles


def _kinds(run: Run) -> str:
    """Numbers of each kind of linear layer, averaged over depth."""
    movement = run.movement
    if not movement.layers:
        return ""
    rows = []
    for kind in movement.kinds():
        layers = movement.of_kind(kind)
        moves = [move for move in movement.moves if move.layer.kind == kind]
        overlaps = [move.overlap for move in moves if move.overlap is not None]
        (m, n), (r, c) = layers[0].shape, map(len, layers[0].latest)
        kept = [f"{100 * float(np.mean([o[place] for o in overlaps])):.0f} %" if overlaps else "-" for place in (0, 1)]
        captured = maps.mean_captured(moves)
        rows.append(
            [
                kind,
                str(len(layers)),
                f"{m:,} x {n:,}",
                f"{r:,} x {c:,}",
                str(sum(move.reason == "relocalized" for move in moves)),
                *kept,
                "-" if captured is None else f"{100 * captured:.1f} %",
                percent(float(np.mean([layer.random_share for layer in layers]))),
            ]
        )
    head = ["kind", "layers", "weight", "subnet", "moves", "rows kept", "columns kept", "captured", "random"]
    return columns(head, rows)


def _compared(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        held_out = next(iter(run.curves.held_out.values()), None)
        trainable = run.fact("trainable_parameters")
        rows.append(
            [
                run.name,
                str(run.fact("method") or "-"),
                f"{trainable:,}" if isinstance(trainable, int) else "-",
                f"{run.curves.loss.last:.4f}" if run.curves.loss else "-",
                f"{held_out.values[0]:.4f}" if held_out else "-",
                f"{held_out.last:.4f}" if held_out else "-",
                f"{run.curves.tokens_per_second.last:,.0f}" if run.curves.tokens_per_second else "-",
                f"{run.curves.memory.last:.2f}" if run.curves.memory else "-",
            ]
        )
    head = ["run", "method", "parameters that train", "training loss", "held-out before", "after", "tokens/s", "peak GB"]
    return columns(head, rows)


def _settings(run: Run) -> str:
    known = {"options", "versions", "groups"}
    facts = {name: value for name, value in {**run.facts, **run.summary}.items() if name not in known and name not in _SAMPLES}
    options, versions = run.facts.get("options"), run.facts.get("versions")
    parts = [
        table(facts, "The run") if facts else "",
        table(run.config, "LoSiA's configuration") if run.config else "",
        table(versions, "Versions") if isinstance(versions, dict) else "",
        table(options, "Options", is_open=False) if isinstance(options, dict) else "",
    ]
    return "".join(parts)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _name_apart(runs: Sequence[Run]) -> None:
    """Directories of one name are told apart by the directories above them, or in the end by their place."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.directory.resolve().parent.name}/{run.name}"
    names = [run.name for run in runs]
    for place, run in enumerate(runs):
        if names.count(names[place]) > 1:
            run.name = f"{names[place]} ({place + 1})"


def _write(path: Path, content: bytes, option: str) -> Path:
    """All or nothing: a page that is there stays until its successor is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.incomplete")
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror or error}. Give another place.") from error
    return path


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
