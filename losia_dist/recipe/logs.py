"""Progress bar, TensorBoard, metrics.jsonl, subnets.jsonl and summary.json of a run; rank 0 alone writes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from losia_dist.digits import short
from losia_dist.recipe.trajectory import Progress
from losia_dist.run.log_files import METRICS, SUMMARY, cut_records
from losia_dist.run.subnet_log import SubnetLog


class RunLog:
    """Collects what a run reports. On other ranks every method does nothing.

    Files in `directory`: metrics.jsonl (one line per log), subnets.jsonl (a line for each time a layer's subnet is set; not
    in full fine-tuning), summary.json (at the end), tensorboard/.

    Args:
        begun: where the run goes on from.
        continues: the logs in `directory` are this run's: what they hold up to there is kept. Else there are none.
    """

    def __init__(self, directory: Path, total_steps: int, enabled: bool, begun: Progress, continues: bool) -> None:
        self.directory, self.enabled = directory, enabled
        self.last: dict[str, Any] = {}
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # imports slowly; other ranks do not need it

        directory.mkdir(parents=True, exist_ok=True)
        if continues:
            _cut(directory / METRICS, begun.step, is_over=begun.step == total_steps)
        self._metrics = (directory / METRICS).open("a" if continues else "w", encoding="utf-8")
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=begun.step + 1 if continues else None)
        # In a log file every refresh would be a line; there, each record is one instead.
        self._bar = tqdm(
            total=total_steps, initial=begun.step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._total = total_steps
        self._subnets: SubnetLog | None = None
        self._start = time.perf_counter() - begun.elapsed

    def follow(self, subnets: SubnetLog | None, continues: bool) -> None:
        """From here on write where the subnets lie, between steps. subnets: on rank 0 of a run that has them."""
        if self.enabled and subnets is not None:
            subnets.begin(self.directory, continues)
            self._subnets = subnets

    def elapsed(self) -> float:
        """Seconds since the run's start, on rank 0; pauses between its processes left out."""
        return time.perf_counter() - self._start if self.enabled else 0.0

    def advance(self, step: int, **values: Any) -> None:
        """Step `step` is done; with values, log them (numbers also to TensorBoard)."""
        if not self.enabled:
            return
        self._bar.update(1)
        if self._subnets is not None:
            self._subnets.write()
        if values:
            self.record(step, **values)

    def record(self, step: int, **values: Any) -> None:
        """Write one line of metrics at an optimizer step.

        A value for each of many things (a dictionary) is a list in metrics.jsonl, whose order is the dictionary's and the
        same in all lines; on the terminal it is left out.
        """
        if not self.enabled:
            return
        many = {name: value for name, value in values.items() if isinstance(value, dict)}
        single = {name: value for name, value in values.items() if name not in many}
        self.last.update(single)
        lists = {name: [_six_digits(one) for one in value.values()] for name, value in many.items()}
        line = {"step": step, "seconds": round(self.elapsed(), 2), **single, **lists}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        for name, value in single.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
            else:
                self._writer.add_text(name, str(value), step)
        for name, value in many.items():
            for part, one in value.items():
                self._writer.add_scalar(f"{name}/{part}", one, step)
        self._bar.set_postfix({name: _shown(value) for name, value in self.last.items()})
        if self._bar.disable:
            self.say(f"step {step}/{self._total}: " + ", ".join(f"{name} {_shown(value)}" for name, value in single.items()))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            self._bar.write(text)

    def close(self) -> None:
        """Close the files, whose contents are complete up to here."""
        if not self.enabled:
            return
        if self._subnets is not None:
            self._subnets.close()
            self._subnets = None
        self._bar.close()
        self._metrics.close()
        self._writer.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Close everything and write summary.json."""
        if not self.enabled:
            return
        self.close()
        (self.directory / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _cut(path: Path, step: int, is_over: bool) -> None:
    """Leave the lines up to `step`. What a killed process wrote beyond it comes again, and so do, with `is_over`, the last
    step's held-out losses."""

    def keep(record: dict[str, Any]) -> bool:
        return record["step"] < step or (record["step"] == step and not (is_over and "held_out" in record))

    cut_records(path, keep)


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _shown(value: Any) -> str:
    return short(value) if isinstance(value, float) else str(value)
