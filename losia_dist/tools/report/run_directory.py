"""A run as its directory tells it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losia_dist.config.losia_config import CONFIG_NAME, LoSiAConfig
from losia_dist.errors import ConfigError, LoSiAError
from losia_dist.run.log_files import FACTS, MEMORY, METRICS, SUBNETS, SUMMARY, read_records
from losia_dist.run.memory_kinds import KINDS
from losia_dist.tools.report.movement import Movement
from losia_dist.tools.report.series import STATE, Curves, note_unreadable, read_curves


@dataclass
class Run:
    """What was found; parts that were not are empty.

    facts: losia_run.json. config: losia_config.json. summary: summary.json, which only a run that ended has.
    memory: losia_memory.json: "peak" and, by kind, "held", in bytes.
    files: what was read. notes: what could not be read, and what is missing, for the reader of the page.
    """

    directory: Path
    name: str
    curves: Curves
    movement: Movement
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_drawn(self) -> bool:
        """Whether subnets are drawn at random, by the run's configuration."""
        try:
            return bool(self.config) and LoSiAConfig.from_dict(dict(self.config)).located is None
        except LoSiAError:
            return False

    def fact(self, name: str) -> Any:
        """From the summary, or else from what was written at the start; None if neither knows."""
        return self.summary.get(name, self.facts.get(name))


def read_run(directory: Path) -> Run:
    """Read a run's directory: `output_dir` of the training script or of a Trainer. The run may still be going on.

    Raises:
        ConfigError: there is no such directory, it cannot be read, or it holds no logs of a run.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "is not there"
        raise ConfigError(f"run directory {directory} {what}: give a run's output_dir.")
    try:
        return _read(directory)
    except OSError as error:
        raise ConfigError(f"run directory {directory} cannot be read: {error}.") from error


def _read(directory: Path) -> Run:
    notes: list[str] = []
    facts, config, summary = (_object(directory / name, notes) for name in (FACTS, CONFIG_NAME, SUMMARY))
    memory = _object(directory / MEMORY, notes)
    if memory and not _is_memory(memory):
        notes.append(f"{MEMORY} could not be read; it does not say what the memory is taken by.")
        memory = {}
    groups = facts.get("groups")
    curves, files = read_curves(directory, groups if isinstance(groups, list) else [], notes)
    movement = Movement()
    broken = sum(record is None or not movement.add(record) for record in read_records(directory / SUBNETS))
    note_unreadable(notes, SUBNETS, broken)
    if not curves and not movement.layers:
        if (directory / METRICS).is_file():
            raise ConfigError(
                f"{directory / METRICS} holds no whole line yet: the run has not logged anything. Wait for its first log line "
                "(--logging_steps), or give another run directory."
            )
        raise ConfigError(
            f"{directory} holds no logs of a run ({METRICS}, {STATE}, TensorBoard's events, {SUBNETS}): give the output_dir of "
            "losia-dist train, or of a Trainer that reports to TensorBoard or saves its state."
        )
    files += [name for name in (SUBNETS, FACTS, CONFIG_NAME, SUMMARY, MEMORY) if (directory / name).is_file()]
    run = Run(directory, directory.resolve().name, curves, movement, facts, config, summary, memory, files, notes)
    steps = run.fact("steps")
    if METRICS in files and isinstance(steps, int) and curves.reached < steps:  # a Trainer need not log its last step
        reached = max(0, curves.reached)
        notes.append(f"The logs end at step {reached} of {steps}: the run is still going on, or was ended before.")
    bad = [step for step, loss in curves.loss.points.items() if not math.isfinite(loss)]
    if bad:
        notes.append(f"The training loss is not finite from step {min(bad)} on: the run has diverged.")
    if run.fact("method") != "full" and not movement.layers:
        notes.append(f"There is no {SUBNETS}: nothing is known of where the subnets lie.")
    return run


def _is_memory(value: dict[str, Any]) -> bool:
    held = value.get("held")
    return isinstance(held, dict) and all(isinstance(one, int) for one in (value.get("peak"), *map(held.get, KINDS)))


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} could not be read; it is not a whole JSON object.")
        return {}
    return value
