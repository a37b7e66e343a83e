"""Rewards for GRPO: a function of yours, or the scorer of a task of reasoning-gym."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from losia_dist.errors import ConfigError

Reward = Callable[..., list[float]]


def read_reward(name: str) -> Reward:
    """The function that MODULE:FUNCTION names; the module may lie in the working directory. It is called as TRL calls rewards:
    function(completions=..., prompts=..., every further column of the data as a list) -> a number for each completion.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"--reward {name}: give MODULE:FUNCTION, for example rewards:length_of_answer.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--reward {name}: {error}.") from error
    if not callable(found):
        raise ConfigError(f"--reward {name}: it is not a function.")
    return found  # type: ignore[no-any-return]


def reasoning_gym_task(name: str, settings: str | None, size: int, seed: int) -> tuple[list[dict[str, Any]], Reward]:
    """Problems of a reasoning-gym task, as chat prompts, and the reward: the task's own score of the answer, 0 to 1.

    Args:
        settings: of the task, as JSON.
        size: how many problems. seed: which.

    Raises:
        ConfigError: reasoning-gym is not installed, or knows no such task or setting.
    """
    try:
        gym: Any = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ConfigError(f"--task {name} needs reasoning-gym: pip install reasoning-gym.") from error
    try:
        problems = gym.create_dataset(name, size=size, seed=seed, **json.loads(settings or "{}"))
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"--task {name} {settings or ''}: {error}") from error
    rows = [{"prompt": [{"role": "user", "content": entry["question"]}], "place": i} for i, entry in enumerate(problems)]

    def score(completions: Sequence[Any], place: Sequence[int], **_: Any) -> list[float]:
        answers = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        return [float(problems.score_answer(answer_in(a), entry=problems[i])) for a, i in zip(answers, place, strict=True)]

    score.__name__ = name
    return rows, score


def answer_in(text: str) -> str:
    """What stands between <answer> tags, or else the last line."""
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
