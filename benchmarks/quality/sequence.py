"""Continued training: one task after the other from where the last one ended, and what is left of the earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.common import table
from benchmarks.quality.setting import Setting
from benchmarks.quality.training import Bench, finite, fit

ARROW = " > "  # between the tasks in a sequence's name


def sequence_setting(setting: Setting, tasks: Sequence[str], rates: Sequence[float]) -> Setting:
    """The setting of a whole sequence: the tasks in order, each at the rate that was best for it alone."""
    return replace(setting, task=ARROW.join(tasks), rate=rates[0], resolved={**setting.resolved, "rates": list(rates)})


def run_sequence(bench: Bench, setting: Setting) -> dict[str, Any]:
    """Train through the tasks; each begins anew (adapters, subnets and moments) on the plain model that the last one left.

    The result gives, before the first task and after each, the losses on every task's held-out problems and on unrelated text.
    """
    tasks = setting.task.split(ARROW)
    stages = [_losses(bench, bench.model, tasks)]
    model = bench.fresh()
    for task, rate in zip(tasks, setting.resolved["rates"], strict=True):
        done = fit(model, bench.fresh, bench.data(task), replace(setting, task=task, rate=rate))
        model = done.trained.plain()
        model.requires_grad_(True)
        stages.append(_losses(bench, model, tasks))
    learned = {task: stages[0][task] - stages[place + 1][task] for place, task in enumerate(tasks)}
    kept = {task: stages[0][task] - stages[-1][task] for task in tasks}
    return finite({"stages": stages, "learned": learned, "kept": kept})


def as_table(records: Sequence[dict[str, Any]]) -> str:
    """By method: what each task gained when it was trained, and what is left of that after the last; unrelated text lost."""
    rows = []
    for record in records:
        setting, result = Setting(**record["setting"]), record["result"]
        gains = [f"{result['learned'][task]:.3f} → {result['kept'][task]:.3f}" for task in result["learned"]]
        lost = result["stages"][-1]["unrelated"] - result["stages"][0]["unrelated"]
        rows.append([setting.label, setting.seed, *gains, f"{lost:.3f}"])
    names = list(records[0]["result"]["learned"]) if records else []
    return table(["method", "seed", *(f"{name}: gain, then at the end" for name in names), "forgetting"], rows)


def _losses(bench: Bench, model: Any, tasks: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for task in tasks:
        losses = bench.losses(model, bench.data(task))
        found[task], found["unrelated"] = losses["held_out"], losses["unrelated"]
    return found
