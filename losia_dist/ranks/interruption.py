"""SIGTERM, as a scheduler sends it before it takes the machines away: all ranks stop after the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

EXIT_CODE = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Interrupted(Exception):
    """The run was asked to end (SIGTERM), and has saved a checkpoint: raised on all ranks, after the same step."""


class Interruption:
    """Whether SIGTERM has reached any rank, agreed on in every step. Made by all ranks together.

    The flags are exchanged on the CPU while the step runs, so that neither a device nor a slower rank is waited for.

    Args:
        wanted: False: SIGTERM ends the process at once, as it does by default, and nothing is exchanged.
        timeout_minutes: of the exchange.
    """

    def __init__(self, wanted: bool, timeout_minutes: float) -> None:
        self.wanted, self._received = wanted, False
        self._group: dist.ProcessGroup | None = None
        if wanted and dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """SIGTERM is taken note of in here. Elsewhere, and outside the main thread, it ends the process."""
        if not self.wanted or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def begin_step(self) -> None:
        """Send what this rank knows. Called by all ranks; returns at once."""
        if self._group is not None:
            self._flag.fill_(self._received)
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def end_step(self) -> bool:
        """Whether any rank knew of SIGTERM when this step began: the same on all ranks. A process alone knows up to now."""
        if self._group is None:
            return self._received
        self._work.wait()
        return bool(self._flag.item())

    def _note(self, number: int, frame: Any) -> None:
        self._received = True
