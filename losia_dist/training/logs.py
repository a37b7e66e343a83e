"""Progress bar, TensorBoard, metrics.jsonl and summary.json of a run; rank 0 alone writes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from losia_dist.training.trajectory import Progress


class RunLog:
    """Collects what a run reports. On other ranks every method does nothing.

    Files in `directory`: metrics.jsonl (one line per log), summary.json (at the end), tensorboard/.

    Args:
        begun: where the run goes on from.
        continues: the logs in `directory` are this run's: what they hold up to there is kept. Else they are replaced.
    """

    def __init__(self, directory: Path, total_steps: int, enabled: bool, begun: Progress, continues: bool) -> None:
        self.directory, self.enabled = directory, enabled
        self.last: dict[str, Any] = {}
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # imports slowly; other ranks do not need it

        directory.mkdir(parents=True, exist_ok=True)
        if continues:
            _cut(directory / "metrics.jsonl", begun.step, is_over=begun.step == total_steps)
        else:
            for old in (directory / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()  # of an earlier run in this directory: TensorBoard would draw both as one curve
        self._metrics = (directory / "metrics.jsonl").open("a" if continues else "w", encoding="utf-8")
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=begun.step + 1 if continues else None)
        # In a log file every refresh would be a line; there, each record is one instead.
        self._bar = tqdm(
            total=total_steps, initial=begun.step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._total = total_steps
        self._start = time.perf_counter() - begun.elapsed

    def elapsed(self) -> float:
        """Seconds since the run's start, on rank 0; pauses between its processes left out."""
        return time.perf_counter() - self._start if self.enabled else 0.0

    def advance(self, step: int, **values: Any) -> None:
        """Step `step` is done; with values, log them (numbers also to TensorBoard)."""
        if not self.enabled:
            return
        self._bar.update(1)
        if values:
            self.record(step, **values)

    def record(self, step: int, **values: Any) -> None:
        """Write one line of metrics at an optimizer step."""
        if not self.enabled:
            return
        self.last.update(values)
        line = {"step": step, "seconds": round(self.elapsed(), 2), **values}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
            else:
                self._writer.add_text(name, str(value), step)
        self._bar.set_postfix({name: _short(value) for name, value in self.last.items()})
        if self._bar.disable:
            self.say(f"step {step}/{self._total}: " + ", ".join(f"{name} {_short(value)}" for name, value in values.items()))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            self._bar.write(text)

    def close(self) -> None:
        """Close the files, whose contents are complete up to here."""
        if not self.enabled:
            return
        self._bar.close()
        self._metrics.close()
        self._writer.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Close everything and write summary.json."""
        if not self.enabled:
            return
        self.close()
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _cut(path: Path, step: int, is_over: bool) -> None:
    """Leave the lines up to `step`. What a killed process wrote beyond it comes again, and so do, with `is_over`, the last
    step's held-out losses."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break  # the process was killed while it wrote the last one
        if record["step"] < step or (record["step"] == step and not (is_over and "held_out" in record)):
            kept.append(line + "\n")
    beside = path.with_name(f"{path.name}.incomplete")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1e4 else f"{value:,.0f}"
    return str(value)
