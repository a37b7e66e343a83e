"""Ranks go on together or stop together: what failed on one of them is raised on all."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from losia_dist import errors
from losia_dist.errors import ConfigError, LoSiAError, some

Result = TypeVar("Result")
_TIMEOUT = timedelta(hours=1)  # a rank may write for long while the others wait


class Agreement:
    """Speaks for the ranks of a group; every method is called by all of them, in the same order.

    Args:
        group: the ranks that take part; None: this process alone.
        is_own: whether `group` is there for nothing else, and carries objects on the CPU. If not, one like it is made, by all
            ranks together: a thread may then speak while training communicates.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, is_own: bool = False) -> None:
        self.rank, self.world_size, self._group = 0, 1, None
        if group is not None:
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
            ranks = dist.get_process_group_ranks(group)
            self._group = group if is_own else dist.new_group(ranks, timeout=_TIMEOUT, backend="gloo")

    @classmethod
    def of_all(cls) -> Agreement:
        """Of all ranks that torch.distributed knows, or of this process alone."""
        return cls(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def attempt(self, what: str | None, action: Callable[[], Result]) -> Result:
        """Run `action` on every rank; if it fails on any, raise the first failing rank's error on all of them.

        `action` must not communicate. The result is this rank's own.

        Args:
            what: what the action does with files: an error that is not this package's becomes a CheckpointError that begins
                so. None: such an error is a fault in the program, which its rank raises itself, traceback and all.

        Raises:
            LoSiAError: what a rank's action raised, with the names of the ranks unless all of them failed alike.
        """
        result: Result | None = None
        failure: Exception | None = None
        mine: tuple[str, str] | None = None
        try:
            result = action()
        except LoSiAError as error:
            failure, mine = error, (type(error).__name__, str(error))
        except Exception as error:  # whatever it is: the other ranks must not be left waiting
            text = f"{type(error).__name__}: {error}"
            failure, mine = error, ("LoSiAError", text) if what is None else ("CheckpointError", f"{what} failed: {text}")
        everyone = self.gather(mine)
        failed = [rank for rank, theirs in enumerate(everyone) if theirs is not None]
        if not failed:
            return result  # type: ignore[return-value]
        if what is None and failure is not None and not isinstance(failure, LoSiAError):
            raise failure
        kind, message = everyone[failed[0]]
        alike = [rank for rank in failed if everyone[rank] == everyone[failed[0]]]
        error_type: type[LoSiAError] = getattr(errors, kind)
        raise error_type(message if len(alike) == self.world_size else f"{self._which(alike)}: {message}") from failure

    def on_first(self, what: str | None, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 and give its result (plain values) to every rank; its failure is raised on all."""
        result = self.attempt(what, lambda: action() if self.rank == 0 else None)
        return self.gather(result)[0]  # type: ignore[no-any-return]

    def same(self, what: str, value: Any) -> None:
        """Raise on every rank unless all ranks pass equal values, before any collective that depends on them.

        value: plain values; of settings (a dictionary of JSON values) the first entry that differs is named.

        Raises:
            ConfigError: what differs, and who has which value.
        """
        gathered = self.gather(_flat(json.loads(json.dumps(value))) if isinstance(value, dict) else {"": value})
        for name in sorted(set().union(*gathered)):
            by_rank = [theirs.get(name) for theirs in gathered]
            odd = next((rank for rank, theirs in enumerate(by_rank) if theirs != by_rank[0]), None)
            if odd is not None:
                raise ConfigError(
                    f"ranks differ in {what}: {name + ' is ' if name else ''}{by_rank[0]!r} on rank 0 and {by_rank[odd]!r} on "
                    f"rank {odd}. Start every rank with the same code, files and options."
                )

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; the same answer on all of them."""
        return any(self.gather(flag))

    def _which(self, ranks: list[int]) -> str:
        return f"rank{'s' if len(ranks) > 1 else ''} {some(ranks, 8)} of {self.world_size}"


def _flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, so that the innermost one that differs is named."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return found


def own_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A process group of LoSiA's own over the given ranks, so that its transfers never wait in the engine's queue."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    return dist.new_group(ranks) if len(ranks) > 1 else None
