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
from losia_dist.tools.report import maps
from losia_dist.tools.report.curves import draw_comparison, draw_learning, draw_measurements
from losia_dist.tools.report.drawing import style
from losia_dist.tools.report.memory import HEAD, draw_memory, memory_row
from losia_dist.tools.report.page import Section, render
from losia_dist.tools.report.run_directory import Run, read_run

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
    if output.is_dir():
        raise ConfigError(f"--output {output} is a directory: give the name of an HTML file.")
    with style():
        run, *others = runs = [read_run(one) for one in (directory, *compare)]
        names = [one.name for one in runs]
        for one in runs:
            if names.count(one.name) > 1:
                one.name = str(one.directory.resolve())
        sections = _sections(run, others)
        page = render(
            title=f"{'Full fine-tuning' if run.fact('method') == 'full' else 'LoSiA'} run {run.name}",
            subtitle=_subtitle(run),
            tiles=_tiles(run),
            notes=run.notes,
            sections=sections,
            footer=f"Made by losia-dist report {__version__} from {', '.join(run.files)}.",
        )
        written = [_write(output, page.encode("utf-8"), "--output")]
        if png is not None:
            pictures = [picture for section in sections for picture in section.pictures]
            written += [_write(png / f"{picture.name}.png", picture.png(), "--png") for picture in pictures]
    return written


def _sections(run: Run, others: Sequence[Run]) -> list[Section]:
    """Everything that the run has logged, drawn. Where subnets are drawn, a map of where they lie is noise: how much of each
    weight has trained is told instead."""
    return [
        Section(
            "All runs",
            f"Below, {run.name} alone is shown; memory is that of all.",
            pictures=draw_comparison([run, *others]) if others else [],
            head=[
                "run", "method", "parameters that train", "training loss", "held-out before", "after", "tokens/s", "peak GB",
            ],
            rows=[_compared(one) for one in (run, *others)] if others else [],
        ),
        Section("Training", pictures=draw_learning(run)),
        Section("Gradient norm, speed and memory", pictures=draw_measurements(run), small=True),
        Section(
            "What memory is taken by",
            pictures=draw_memory([run, *others]),
            head=HEAD,
            rows=[memory_row(one) for one in (run, *others) if one.memory],
        ),
        Section(
            "How much importance the subnets hold",
            "Measured when a subnet is chosen: importance inside it over that of the whole layer.",
            pictures=maps.draw_importance(run),
        ),
        Section(
            "How much of the weights has trained",
            "Subnets are drawn at random, so where they lie says nothing; how much of each weight they have been on does.",
            pictures=maps.draw_coverage(run),
            head=["kind", "layers", "weight", "subnet", "moves", "trained so far", "at least"],
            rows=[_covered(run, kind) for kind in run.movement.kinds()],
        )
        if run.is_drawn
        else Section(
            "Where the subnets are, and how they move",
            "Each map shows a kind of linear layer: one line for each depth, and neurons by their position from left to right "
            "(in wide layers several to a dot).",
            key=(
                (maps.STAYED, "in the first subnet and in the latest"),
                (maps.JOINED, "only in the latest"),
                (maps.LEFT, "only in the first"),
            ),
            pictures=maps.draw_movement(run),
            head=["kind", "layers", "weight", "subnet", "moves", "rows kept", "columns kept", "captured", "random"],
            rows=[_kind(run, kind) for kind in run.movement.kinds()],
        ),
        Section("Answers", "To held-out prompts, greedily.", samples=_answers(*map(run.summary.get, _SAMPLES))),
        Section("Configuration and versions", folded=_settings(run)),
    ]  # fmt: skip


def _subtitle(run: Run) -> str:
    ranks, steps = run.fact("ranks"), run.fact("steps")
    parts = [
        run.fact("engine"),
        run.fact("precision"),
        f"{ranks} rank{'' if ranks == 1 else 's'}" if ranks else "",
        f"{steps:,} steps" if isinstance(steps, int) else "",
        run.facts.get("device"),
        str(run.facts.get("begun") or "").replace("T", " ").replace("+00:00", " UTC"),
    ]
    return " · ".join(str(part) for part in parts if part)


def _tiles(run: Run) -> list[tuple[str, str]]:
    curves, tiles = run.curves, []
    for name, curve in curves.held_out.items():
        ends = dict.fromkeys([min(curve.points), max(curve.points)])
        what = "held-out loss" if name == "held-out" else f"held-out loss, {name}"
        tiles.append((" → ".join(f"{curve.points[step]:.3f}" for step in ends), what))
    if curves.loss:
        tiles.append((f"{curves.loss.last:.3f}", "training loss at the end"))
    if isinstance(trainable := run.fact("trainable_parameters"), int):
        tiles.append((f"{trainable:,}", "parameters that train"))
    if isinstance(seconds := run.summary.get("training_seconds"), int | float):
        tiles.append((_duration(float(seconds)), "of training"))
    if curves.tokens_per_second:
        tiles.append((f"{curves.tokens_per_second.last:,.0f}", "tokens per second"))
    if curves.memory:
        tiles.append((f"{curves.memory.last:.2f} GB", "peak memory of a rank"))
    moves = run.movement.moves
    if run.movement.layers:
        moved = {move.layer.name for move in moves if move.reason == "relocalized"}
        how = "drawn anew" if run.is_drawn else "re-localized"
        tiles.append((f"{len(moved)} of {len(run.movement.layers)}", f"layers {how}"))
    if (captured := maps.mean_captured(moves)) is not None:
        chance = percent(float(np.mean([move.layer.random_share for move in moves if move.captured is not None])))
        tiles.append((f"{100 * captured:.0f} %", f"of importance captured; a random subnet {chance}"))
    return tiles


def _kind(run: Run, kind: str) -> list[str]:
    """Numbers of a kind of linear layer, averaged over depth."""
    layers = run.movement.of_kind(kind)
    moves = [move for move in run.movement.moves if move.layer.kind == kind]
    overlaps = [move.overlap for move in moves if move.overlap is not None]
    (m, n), (r, c) = layers[0].shape, layers[0].taken
    captured = maps.mean_captured(moves)
    kept = [f"{100 * share:.0f} %" for share in np.mean(overlaps, axis=0)] if overlaps else ["-", "-"]
    return [
        kind,
        str(len(layers)),
        f"{m:,} x {n:,}",
        f"{r:,} x {c:,}",
        str(sum(move.reason == "relocalized" for move in moves)),
        *kept,
        "-" if captured is None else f"{100 * captured:.1f} %",
        percent(float(np.mean([layer.random_share for layer in layers]))),
    ]


def _covered(run: Run, kind: str) -> list[str]:
    """Coverage of a kind of linear layer."""
    layers = run.movement.of_kind(kind)
    (m, n), (r, c) = layers[0].shape, layers[0].taken
    moves = sum(move.reason == "relocalized" and move.layer.kind == kind for move in run.movement.moves)
    shares = [layer.covered for layer in layers]
    numbers = [str(len(layers)), f"{m:,} x {n:,}", f"{r:,} x {c:,}", str(moves)]
    return [kind, *numbers, percent(float(np.mean(shares))), percent(min(shares))]


def _compared(run: Run) -> list[str]:
    held_out = next(iter(run.curves.held_out.values()), None)
    loss, speed, memory = run.curves.loss, run.curves.tokens_per_second, run.curves.memory
    trainable = run.fact("trainable_parameters")
    return [
        run.name,
        str(run.fact("method") or "-"),
        f"{trainable:,}" if isinstance(trainable, int) else "-",
        f"{loss.last:.4f}" if loss else "-",
        f"{held_out.values[0]:.4f}" if held_out else "-",
        f"{held_out.last:.4f}" if held_out else "-",
        f"{speed.last:,.0f}" if speed else "-",
        f"{memory.last:.2f}" if memory else "-",
    ]


def _answers(before: Any, after: Any) -> list[list[tuple[str, Any]]]:
    """Sample answers before and after training; pairs by place, and what lacks its prompt or answer is left out."""
    before, after = (samples if isinstance(samples, list) else [] for samples in (before, after))
    found = []
    for place, sample in enumerate(after):
        if not isinstance(sample, dict) or not {"prompt", "answer"} <= set(sample):
            continue
        untrained = before[place] if place < len(before) and isinstance(before[place], dict) else {}
        named = [
            ("Prompt", sample, "prompt"),
            ("Before training", untrained, "answer"),
            ("After training", sample, "answer"),
            ("Expected", sample, "expected"),
        ]
        found.append([(name, texts[key]) for name, texts, key in named if key in texts])
    return found


def _settings(run: Run) -> dict[str, dict[str, Any]]:
    shown_elsewhere = {"options", "versions", "groups", *_SAMPLES}
    tables = {
        "The run": {name: value for name, value in {**run.facts, **run.summary}.items() if name not in shown_elsewhere},
        "LoSiA's configuration": run.config,
        "Versions": run.facts.get("versions"),
        "Options": run.facts.get("options"),
    }
    return {title: values for title, values in tables.items() if isinstance(values, dict)}


def _duration(seconds: float) -> str:
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


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
