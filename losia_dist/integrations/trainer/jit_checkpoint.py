"""`TrainingArguments.enable_jit_checkpoint` with subnets: SIGTERM saves at the end of a step, and on all ranks at the same one.

Transformers' own callback saves before the optimizer's step, where gradients are half of a step that no checkpoint holds, and
each rank when its own signal has come (transformers 5.24, `trainer_jit_checkpoint`). It is taken out, and this in its place.
"""

from __future__ import annotations

import signal
from typing import Any

from transformers import TrainerCallback

from losia_dist.errors import UnsupportedError
from losia_dist.ranks.interruption import Interruption


class StepEndCheckpoint(Interruption, TrainerCallback):
    """Learns of SIGTERM inside `watched()`. Made by all ranks together.

    Every later signal is ignored: the run is ending. One that comes between two steps, in an evaluation say, is served at the
    end of the step that follows; after the last step nothing is left to be saved for.

    Attributes:
        wanted: whether it does anything.
        due: SIGTERM has reached some rank: the step that has ended is to be saved, and training to stop. Same on all ranks.
    """

    due = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.due = self.end_step()


def take_over(trainer: Any) -> StepEndCheckpoint:
    """Put this callback into a trainer, in the place of Transformers' own if that was asked for. Called by all ranks.

    Raises:
        UnsupportedError: checkpoints that cannot be resumed from were asked for.
    """
    wanted = bool(getattr(trainer.args, "enable_jit_checkpoint", False))
    if wanted:
        from transformers.trainer_jit_checkpoint import JITCheckpointCallback

        theirs = trainer.callback_handler.pop_callback(JITCheckpointCallback)
        before = getattr(getattr(theirs, "jit_manager", None), "_original_sigterm_handler", None)
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if trainer.args.save_only_model:
            raise UnsupportedError(
                "enable_jit_checkpoint=True with save_only_model=True would leave a checkpoint that cannot be resumed from: "
                "take one of them out."
            )
    ours = StepEndCheckpoint(wanted, trainer.args.ddp_timeout / 60)
    trainer.callback_handler.add_callback(ours)
    return ours
