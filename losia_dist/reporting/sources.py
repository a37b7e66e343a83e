"""The logs that a run may have left, each read into `Curves`: metrics.jsonl, trainer_state.json, TensorBoard's events."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from losia_dist.reporting.records import METRICS, read_records
from losia_dist.reporting.series import Curves

STATE = "trainer_state.json"


def read_curves(directory: Path, groups: Sequence[str]) -> tuple[Curves, list[str], list[str]]:
    """The curves of the first kind of log that has any.

    Args:
        groups: in whose order metrics.jsonl lists learning rates.

    Returns:
        curves (maybe empty), names of the files read, and notes on what could not be read.
    """
    notes: list[str] = []
    for read in (_metrics, _trainer_state, _tensorboard):
        curves, files = read(directory, groups, notes)
        if curves:
            return curves, files, notes
    return Curves(), [], notes


def _metrics(directory: Path, groups: Sequence[str], notes: list[str]) -> tuple[Curves, list[str]]:
    curves, broken = Curves(), 0
    for record in read_records(directory / METRICS):
        step = record.get("step") if record is not None else None
        if record is None or not isinstance(step, int):
            broken += 1
            continue
        for name, value in record.items():
            curves.add(name, step, value)
        rates = record.get("learning_rates")
        if isinstance(rates, list) and len(rates) == len(groups):
            for group, rate in zip(groups, rates, strict=True):
                curves.add(f"learning_rates/{group}", step, rate)
    if broken:
        notes.append(unreadable(METRICS, broken))
    return curves, [METRICS]


def _trainer_state(directory: Path, groups: Sequence[str], notes: list[str]) -> tuple[Curves, list[str]]:
    """Of the run's end, or of its newest checkpoint."""
    curves = Curves()
    checkpoints = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in [directory / STATE, *(checkpoint / STATE for checkpoint in newest_first)]:
        if not path.is_file():
            continue
        name = str(path.relative_to(directory))
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            entries = [(entry, int(entry["step"])) for entry in history]
        except (ValueError, KeyError, TypeError):
            notes.append(f"{name} could not be read; it is not a whole trainer state.")
            continue
        for entry, step in entries:
            for key, value in entry.items():
                curves.add(key, step, value)
        if curves:
            return curves, [name]
    return curves, []


def _tensorboard(directory: Path, groups: Sequence[str], notes: list[str]) -> tuple[Curves, list[str]]:
    curves, files = Curves(), list[str]()
    folders = {path.parent: path.stat().st_mtime for path in sorted(directory.rglob("events.out.tfevents.*"))}
    if not folders:
        return curves, files
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in sorted(folders, key=lambda path: folders[path]):  # a resumed run goes on in a folder of its own
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                curves.add(tag, event.step, event.value)
        files.append(f"TensorBoard events in {folder.relative_to(directory)}")
    return curves, files


def unreadable(name: str, lines: int) -> str:
    """A note on lines that were passed over."""
    what = "1 line" if lines == 1 else f"{lines} lines"
    return (
        f"{what} of {name} could not be read and {'is' if lines == 1 else 'are'} left out (a killed run may leave half a line)."
    )
