"""What one conductor's run remembers of its checkpoints: the directories it saves to, and a save that is under way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from losia_dist.checkpoint.base import Chain
from losia_dist.checkpoint.journal import watch
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.errors import ConfigError
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.conductor import LoSiA

_sessions: weakref.WeakKeyDictionary[LoSiA, Session] = weakref.WeakKeyDictionary()


class Session:
    """Made by all ranks together, at a conductor's first save or load.

    Attributes:
        agreement: speaks for all ranks of the run.
        chains: directory -> the base and journal that this run continues there.
    """

    def __init__(self, losia: LoSiA) -> None:
        self.agreement = Agreement(losia.collectives.group)
        self.chains: dict[Path, Chain] = {}
        watch(losia, lambda: [chain.pending for chain in self.chains.values()])
        self._thread = ThreadPoolExecutor(1, "losia-checkpoint")
        self._saving: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Run `write` in a thread; the interpreter does not end before it has."""
        self._saving = self._thread.submit(write)

    def wait(self) -> None:
        """Wait for the save under way, if any, and raise what it failed with (the same on every rank)."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


def session_of(losia: LoSiA) -> Session:
    """The conductor's session. Called by all ranks."""
    if losia not in _sessions:
        _sessions[losia] = Session(losia)
    return _sessions[losia]


def check_parts(losia: Any, model: Any, optimizer: Any) -> None:
    """Refuse what is no conductor, and a model or an optimizer that is not the conductor's own.

    Raises:
        ConfigError: with what it is.
    """
    if not isinstance(losia, LoSiA):
        raise ConfigError(f"losia={type(losia).__name__}: pass the conductor (LoSiA(...), or engine.losia under DeepSpeed).")
    if unwrap(model) is not unwrap(losia.model):
        raise ConfigError("model is not the one that this conductor drives: pass the model that LoSiA(...) was given.")
    inner: Any = optimizer
    while inner is not None and inner is not losia.state.optimizer:
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise ConfigError("optimizer is not the one that this conductor drives: pass the optimizer that LoSiA(...) was given.")


def wait_for_saving(losia: LoSiA) -> None:
    """Wait until an asynchronous save is complete. Called by all ranks; at the latest before destroy_process_group.

    Raises:
        CheckpointError: it failed; the checkpoint before it is whole.
    """
    if losia in _sessions:
        _sessions[losia].wait()
