"""Progress bar, metrics.jsonl, subnets.jsonl, summary.json and trackers of a run; rank 0 alone writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from losia_dist.digits import short
from losia_dist.recipe.trackers import Tracker
from losia_dist.recipe.trajectory import Progress
from losia_dist.run.log_files import METRICS, SUMMARY, cut_records
from losia_dist.run.subnet_log import SubnetLog

_WORDS = {
    "held_out": "held-out loss {}",
    "lr": "rate {}",
    "grad_norm": "gradient norm {}",
    "tokens_per_second": "{} tokens/s",
    "peak_memory_gb": "peak {} GB",
    "localizing": "locating {}",
}


class RunLog:
    """Collects what a run reports. On other ranks every method does nothing.

    Files in `directory`: metrics.jsonl (one line per log), subnets.jsonl (a line for each time a layer's subnet is set; not
    in full fine-tuning), summary.json (at the end).

    Args:
        begun: where the run goes on from.
        continues: the logs in `directory` are this run's: what they hold up to there is kept. Else there are none.
        trackers: that get the same numbers (`start_trackers`).
    """

    def __init__(
        self,
        directory: Path,
        total_steps: int,
        enabled: bool,
        begun: Progress,
        continues: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.directory, self.enabled = directory, enabled
        self.last: dict[str, Any] = {}
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if continues:
            _cut(directory / METRICS, begun.step, is_over=begun.step == total_steps)
        self._metrics = (directory / METRICS).open("a" if continues else "w", encoding="utf-8")
        self._trackers = trackers
        # In a log file every refresh would be a line; there, each record is one instead.
        self._bar = tqdm(
            total=total_steps, initial=begun.step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._total, self._begun = total_steps, begun
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
        """Step `step` is done; with values, log them."""
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
        same in all lines; trackers get its lowest, mean and highest (a large model would fill them with charts), the terminal
        nothing.
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
        numbers = {name: value for name, value in single.items() if isinstance(value, int | float)}
        for name, values_of in many.items():
            numbers |= of_many(name, [*values_of.values()])
        texts = {name: str(value) for name, value in single.items() if name not in numbers}
        for tracker in self._trackers:
            tracker.log(step, numbers, texts)
        self._bar.set_postfix_str(in_words(self.last))
        if self._bar.disable:
            self.say(f"step {step}/{self._total}: {in_words(single)}{self._left(step)}")

    def _left(self, step: int) -> str:
        done, left = step - self._begun.step, self._total - step
        if done < 1 or left < 1:
            return ""
        seconds = round((self.elapsed() - self._begun.elapsed) / done * left)
        return f", {timedelta(seconds=seconds)} left"

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
        for tracker in self._trackers:
            tracker.finish()

    def finish(self, summary: dict[str, Any]) -> None:
        """Close everything and write summary.json."""
        if not self.enabled:
            return
        self.close()
        (self.directory / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def of_many(name: str, values: Sequence[float]) -> dict[str, float]:
    """Three numbers for many: lowest, mean and highest."""
    one = name.removesuffix("s")
    return {f"lowest_{one}": min(values), f"mean_{one}": sum(values) / len(values), f"highest_{one}": max(values)}


def in_words(values: Mapping[str, Any]) -> str:
    """Values as a person reads them: loss 1.23, rate 5e-05, 1,020 tokens/s."""
    return ", ".join(_WORDS.get(name, f"{name} {{}}").format(_shown(value)) for name, value in values.items())


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
