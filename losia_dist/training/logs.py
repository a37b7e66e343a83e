"""Progress bar, TensorBoard, metrics.jsonl and summary.json of a run; rank 0 alone writes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Collects what a run reports. On other ranks every method does nothing.

    Files in `directory`: metrics.jsonl (one line per log), summary.json (at the end), tensorboard/.
    """

    def __init__(self, directory: Path, total_steps: int, enabled: bool) -> None:
        self.directory, self.enabled = directory, enabled
        self.last: dict[str, Any] = {}
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # imports slowly; other ranks do not need it

        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = (directory / "metrics.jsonl").open("w", encoding="utf-8")
        for old in (directory / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()  # of an earlier run in this directory: TensorBoard would draw both as one curve
        self._writer = SummaryWriter(str(directory / "tensorboard"))
        # In a log file every refresh would be a line; there, each record is one instead.
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self._total = total_steps
        self._start = time.perf_counter()

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
        line = {"step": step, "seconds": round(time.perf_counter() - self._start, 2), **values}
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

    def finish(self, summary: dict[str, Any]) -> None:
        """Close everything and write summary.json."""
        if not self.enabled:
            return
        self._bar.close()
        self._metrics.close()
        self._writer.close()
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1e4 else f"{value:,.0f}"
    return str(value)
