"""Checkpoints that a run of Transformers' Trainer resumes from.

    output_dir/checkpoint-12/    the Trainer's: a plain model, trainer_state.json; what people name and what is rotated
    output_dir/_losia_state/     this package's, of the whole run: its base once, and the entry checkpoint-12

What resumes is the pair. The model in checkpoint-12 is read by nothing here.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from losia_dist.checkpoint import layout, random_state
from losia_dist.checkpoint.load import load_from
from losia_dist.checkpoint.save import save_as
from losia_dist.errors import CheckpointError
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.conductor import LoSiA

logger = logging.getLogger(__name__)
_PREFIX = "checkpoint-"


class TrainerCheckpoints:
    """Pairs a Trainer's checkpoints with LoSiA's state. Made by all ranks together; every method is called by all ranks.

    Args:
        group: all ranks of the run; None: this process alone.

    Attributes:
        agreement: speaks for them.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.agreement = Agreement(group)
        self._output = Path()
        self._chosen: Path | None = None  # the checkpoint to resume from
        self._newest: str | None = None  # the entry that this run has saved or loaded last: later ones build on it
        self._random: dict[str, Any] | None = None

    def choose(self, output_dir: str, asked: str | bool | None, saves: bool) -> str | bool | None:
        """Settle, before anything is prepared, what is resumed from; returns what to tell `Trainer.train`.

        Args:
            output_dir: of the training arguments; all ranks share it.
            asked: resume_from_checkpoint: a path, or True for the newest `checkpoint-N` of which both parts are complete.
            saves: whether this run is to write checkpoints that can be resumed from.

        Raises:
            CheckpointError: on every rank: the checkpoint lacks a part, or another run's state is in the way of this one's.
            ConfigError: ranks ask for different things.
        """
        asked = None if asked is False else asked if asked is True or asked is None else str(asked)
        self.agreement.same("output_dir and resume_from_checkpoint", [str(output_dir), asked])
        self._output, self._newest = Path(output_dir), None
        chosen = self.agreement.on_first(f"looking for checkpoints in {output_dir}", lambda: self._choose(asked, saves))
        self._chosen = None if chosen is None else Path(chosen)
        return chosen or asked  # nothing is asked for, or nothing is there at all: the Trainer says so itself

    def resume(self, losia: LoSiA, scheduler: Any, *, goes_on_saving: bool) -> None:
        """Load the state that `choose` settled on, if any, into a conductor that was just made.

        Args:
            goes_on_saving: whether `save` may be called later.

        Raises:
            CheckpointError: as `load_checkpoint`; nothing has been changed then.
        """
        if self._chosen is None:
            return
        before = random_state.read()
        load_from(
            self._chosen.parent / layout.BESIDE,
            losia,
            scheduler=scheduler,
            name=self._chosen.name,
            saves_on=goes_on_saving and self._chosen.parent == self._output,
        )
        # The Trainer restores random states only once the data loader has been wound forward.
        self._random = random_state.read()
        random_state.restore(before)
        self._newest = self._chosen.name

    def restore_random_state(self) -> None:
        """Random numbers go on from where the checkpoint was saved."""
        assert self._random is not None
        random_state.restore(self._random)

    def save(self, directory: str | Path, losia: LoSiA, scheduler: Any) -> None:
        """Write LoSiA's state for the checkpoint `directory`, whose trainer_state.json is to follow.

        Raises:
            CheckpointError: as `save_checkpoint`.
        """
        output, name = Path(directory).parent, Path(directory).name
        # An earlier attempt's must not make a pair with the state of this one.
        before = Path(directory) / TRAINER_STATE_NAME
        self.agreement.on_first(f"saving to {directory}", lambda: before.unlink(missing_ok=True))
        save_as(output / layout.BESIDE, name, losia, scheduler=scheduler)
        self._newest = name

    def remove_rotated(self, *, at_the_end: bool = False) -> None:
        """Delete the state of every `checkpoint-N` that is there no more. Until the end of the run its newest state stays."""
        if self.agreement.rank == 0:
            layout.remove_orphans(self._output / layout.BESIDE, self._output, None if at_the_end else self._newest)

    def _choose(self, asked: str | bool | None, saves: bool) -> str | None:
        """The checkpoint's directory; its parent is `output_dir` itself where that is what it is. Rank 0 reads."""
        found = self._newest_complete() if asked is True else None if asked is None else self._named(Path(str(asked)))
        if saves and (found is None or found.parent != self._output):
            complete = layout.complete_checkpoints(self._output / layout.BESIDE)
            if complete:
                raise CheckpointError(
                    f"{self._output} holds the checkpoints of another run ({complete[-1].path.name} ...): go on from them with "
                    "resume_from_checkpoint=True, set another output_dir, or delete them together with "
                    f"{self._output / layout.BESIDE}."
                )
        return None if found is None else str(found)

    def _named(self, path: Path) -> Path:
        why = _why_not(path)
        if why is not None:
            there = ", ".join(other.name for other in layout.numbered(path.parent, _PREFIX) if _why_not(other) is None)
            raise CheckpointError(
                f"resume_from_checkpoint={str(path)!r}: {why}. Resume from another one (complete there: {there or 'none'}), or "
                "start a new run from a saved model with from_pretrained."
            )
        # One directory has one name, or the run would take its own state for another's.
        return self._output / path.name if path.parent.resolve() == self._output.resolve() else path

    def _newest_complete(self) -> Path | None:
        numbered = layout.numbered(self._output, _PREFIX)
        passed_over: list[str] = []
        for path in reversed(numbered):
            why = _why_not(path)
            if why is None:
                for line in passed_over:
                    logger.warning("passed over: %s. Resuming from %s.", line, path.name)
                return path
            passed_over.append(f"{path.name}: {why}")
        if passed_over:
            raise CheckpointError(
                f"resume_from_checkpoint=True: no checkpoint in {self._output} can be resumed from. {passed_over[0]}. Start a "
                "new run from a saved model with from_pretrained."
            )
        return None


def warn_of_data(dataset: Any, checkpoint: str, *, ignore_data_skip: bool) -> None:
    """Say where a resumed run will not see the data that the run would have seen; rank 0 calls it.

    Args:
        dataset: the training data; of one without a length the Trainer winds forward through the first pass only.
        checkpoint: a directory of the Trainer's, with its trainer_state.json.
    """
    if ignore_data_skip:
        logger.warning(
            "resuming with ignore_data_skip=True: the data begins anew, so that the run does not go on as it would have."
        )
        return
    try:
        passes = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("epoch") or 0
    except (OSError, ValueError):
        return  # the Trainer, which needs it, says so
    if not has_length(dataset) and passes > 1:
        logger.warning(
            "resuming in pass %d over an iterable data set: the Trainer winds forward through the first pass only, so that "
            "this run goes on from the beginning of a pass, and not bit for bit. A data set with a length goes on as it was.",
            int(passes) + 1,
        )


def _why_not(path: Path) -> str | None:
    """What a checkpoint lacks to be resumed from, in words; None: nothing."""
    if not path.is_dir():
        return "there is no such directory"
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return (
            f"its {TRAINER_STATE_NAME} is missing or cut off: saving it did not finish, or it is no checkpoint of the Trainer"
        )
    state = path.parent / layout.BESIDE
    if path.name not in [complete.name for complete in layout.complete_checkpoints(state)]:
        return (
            f"it holds a model only, and {state / path.name}, LoSiA's state, is missing or incomplete: it was saved with "
            f"save_only_model=True or without LoSiA, or was moved without {layout.BESIDE}"
        )
    return None
