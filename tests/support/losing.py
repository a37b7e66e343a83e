"""Runs the training script, which this process then loses at a step of its own choice.

Put between a launcher and launch/train.py. LOSE_STEP: after which step. LOSE_RANK: which rank does it. LOSE_BY: "SIGKILL", its
own end without a word, or "SIGTERM", which it sends to the launcher, as a scheduler does.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any


def lose(step: int, by: str) -> None:
    """Let this process come to its end after a step."""
    from losia_dist.recipe.logs import RunLog

    advance = RunLog.advance

    def watched(self: Any, done: int, **values: Any) -> None:
        advance(self, done, **values)
        if done == step and by == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif done == step:
            os.kill(os.getppid(), signal.SIGTERM)

    RunLog.advance = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    script = next(word for word in sys.argv[1:] if word.endswith("train.py"))
    sys.argv = [script, *(word for word in sys.argv[1:] if word != script)]
    if os.environ.get("RANK", "0") == os.environ["LOSE_RANK"]:
        lose(int(os.environ["LOSE_STEP"]), os.environ["LOSE_BY"])
    runpy.run_path(script, run_name="__main__")
