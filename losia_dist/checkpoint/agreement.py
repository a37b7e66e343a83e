"""Ranks go on together or stop together: what failed on one of them is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from losia_dist.errors import CheckpointError, ConfigError, LoSiAError

Result = TypeVar("Result")
_TIMEOUT = timedelta(hours=1)  # a rank may write for long while the others wait


class Agreement:
    """Over all ranks of a run, on a CPU process group of its own: a thread may use it while training communicates.

    Args:
        group: the ranks that take part; None: this process alone. Made by all ranks together.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.rank, self.world_size, self._group = 0, 1, None
        if group is not None:
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
            self._group = dist.new_group(dist.get_process_group_ranks(group), timeout=_TIMEOUT, backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def attempt(self, what: str, action: Callable[[], Result]) -> Result:
        """Run `action` on every rank; if it fails on any, raise the first failing rank's error on all of them.

        `action` must not communicate. The result is this rank's own.

        Raises:
            ConfigError, CheckpointError: what a rank's action raised, or CheckpointError for a file error.
        """
        result, failure = None, None
        try:
            result = action()
        except LoSiAError as error:
            failure = (type(error) is ConfigError, str(error))
        except Exception as error:  # whatever it is: the other ranks must not be left waiting
            failure = (False, f"{what} failed: {type(error).__name__}: {error}")
        failures = self.gather(failure)
        for rank, found in enumerate(failures):
            if found is not None:
                of_config, message = found
                same = all(other == found for other in failures)
                text = message if same else f"{message} (rank {rank})"
                raise ConfigError(text) if of_config else CheckpointError(text)
        return result  # type: ignore[return-value]

    def on_first(self, what: str, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 and give its result (plain values) to every rank; its failure is raised on all."""
        result = self.attempt(what, lambda: action() if self.rank == 0 else None)
        return self.gather(result)[0]  # type: ignore[no-any-return]

    def same(self, what: str, value: Any) -> None:
        """Raise on every rank unless all ranks pass equal values.

        Raises:
            ConfigError: who differs.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(f"ranks differ in {what}: {values[0]!r} on rank 0 and {other!r} on rank {rank}.")
