"""The measured curves of a run, under one name each, from whichever log it left: metrics.jsonl, trainer_state.json,
TensorBoard's events."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from losia_dist.run.log_files import METRICS, read_records

STATE = "trainer_state.json"
# Names in metrics.jsonl and its TensorBoard, and in the Trainer's log_history and its TensorBoard, where both have prefixes.
_CURVES = {
    "loss": "loss",
    "lr": "rate",
    "learning_rate": "rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "train_tokens_per_second": "tokens_per_second",
    "peak_memory_gb": "memory",
    "losia/peak_memory_gb": "memory",
    "experts_trained": "experts_trained",
    "losia/experts_trained": "experts_trained",
    "experts_busiest": "experts_busiest",
    "losia/experts_busiest": "experts_busiest",
}
_RATE_OF_GROUP = re.compile(r"(?:losia/learning_rate|learning_rates)/(.+)")
_HELD_OUT = re.compile(r"held_out|eval[_/](?:(.+)_)?loss")


@dataclass
class Curve:
    """Values at optimizer steps; the last one said of a step counts."""

    points: dict[int, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.points)

    @property
    def steps(self) -> list[int]:
        """In ascending order."""
        return sorted(self.points)

    @property
    def values(self) -> list[float]:
        """In the order of the steps."""
        return [self.points[step] for step in self.steps]

    @property
    def last(self) -> float:
        """At the latest step."""
        return self.points[max(self.points)]


@dataclass
class Curves:
    """Curves of a run, each over optimizer steps; empty ones were not logged.

    loss: of training, nats a token. held_out: by the data set's name, "held-out" where there is one. rate: scheduled learning
    rate. rates: by group, rewarming included. memory: peak, 10^9 bytes. experts_trained: share of experts that tokens reached,
    0 to 1. experts_busiest: tokens of the busiest expert as a multiple of its layer's mean.
    """

    loss: Curve = field(default_factory=Curve)
    rate: Curve = field(default_factory=Curve)
    grad_norm: Curve = field(default_factory=Curve)
    tokens_per_second: Curve = field(default_factory=Curve)
    memory: Curve = field(default_factory=Curve)
    experts_trained: Curve = field(default_factory=Curve)
    experts_busiest: Curve = field(default_factory=Curve)
    held_out: dict[str, Curve] = field(default_factory=dict)
    rates: dict[str, Curve] = field(default_factory=dict)

    @property
    def reached(self) -> int:
        """The latest step of any curve; -1 where all are empty."""
        single = (self.loss, self.rate, self.grad_norm, self.tokens_per_second, self.memory)
        return max((max(c.points) for c in (*single, *self.held_out.values(), *self.rates.values()) if c), default=-1)

    def __bool__(self) -> bool:
        return self.reached >= 0

    def add(self, name: str, step: int, value: object) -> None:
        """Take in a logged value; what is not a number, or no curve of a report, is passed over."""
        if isinstance(value, bool) or not isinstance(value, int | float) or step < 0:
            return
        name = name.removeprefix("train/")
        if name in _CURVES:
            curve: Curve = getattr(self, _CURVES[name])
        elif found := _HELD_OUT.fullmatch(name):
            curve = self.held_out.setdefault(found.group(1) or "held-out", Curve())
        elif found := _RATE_OF_GROUP.fullmatch(name):
            curve = self.rates.setdefault(found.group(1), Curve())
        else:
            return
        curve.points[step] = float(value)


def read_curves(directory: Path, groups: Sequence[str], notes: list[str]) -> tuple[Curves, list[str]]:
    """The curves of the first kind of log that has any, maybe empty, and the names of the files read.

    Args:
        groups: in whose order metrics.jsonl lists learning rates.
        notes: takes in what could not be read.
    """
    curves = Curves()
    for read in (_metrics, _trainer_state, _tensorboard):
        files = read(directory, groups, notes, curves)
        if curves:
            return curves, files
    return curves, []


def _metrics(directory: Path, groups: Sequence[str], notes: list[str], curves: Curves) -> list[str]:
    broken = 0
    for record in read_records(directory / METRICS):
        step = record.get("step") if record is not None else None
        if record is None or not isinstance(step, int):
            broken += 1
            continue
        rates = record.get("learning_rates")
        if isinstance(rates, list) and len(rates) == len(groups):
            record |= {f"learning_rates/{group}": rate for group, rate in zip(groups, rates, strict=True)}
        for name, value in record.items():
            curves.add(name, step, value)
    note_unreadable(notes, METRICS, broken)
    return [METRICS]


def _trainer_state(directory: Path, groups: Sequence[str], notes: list[str], curves: Curves) -> list[str]:
    """Of the run's end, or of its newest checkpoint."""
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
            return [name]
    return []


def _tensorboard(directory: Path, groups: Sequence[str], notes: list[str], curves: Curves) -> list[str]:
    folders = {path.parent: path.stat().st_mtime for path in sorted(directory.rglob("events.out.tfevents.*"))}
    if not folders:
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    in_order = sorted(folders, key=lambda path: folders[path])  # a resumed run goes on in a folder of its own
    for folder in in_order:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                curves.add(tag, event.step, event.value)
    return [f"TensorBoard events in {folder.relative_to(directory)}" for folder in in_order]


def note_unreadable(notes: list[str], name: str, lines: int) -> None:
    """Add a note on lines that were passed over, if there were any."""
    if lines:
        what, are = ("1 line", "is") if lines == 1 else (f"{lines} lines", "are")
        notes.append(f"{what} of {name} could not be read and {are} left out (a killed run may leave half a line).")
