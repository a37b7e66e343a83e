"""Agreement among ranks: what one of them cannot do, none of them starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from losia_dist import errors
from losia_dist.errors import ConfigError, LoSiAError

Result = TypeVar("Result")


def on_all_ranks(work: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """Run local work (no collectives in it) on every rank; if it fails on any rank, every rank raises the same error.

    Called by all ranks of the group, in the same order; None: this process alone.

    Raises:
        LoSiAError: what the work raised, with the names of the ranks unless all of them failed alike. A rank whose work
            raised anything else raises that itself, so that its traceback is seen.
    """
    if group is None:
        return work()
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    mine = None if failure is None else (type(failure).__name__, str(failure))
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    failed = [rank for rank, theirs in enumerate(everyone) if theirs is not None]
    if not failed:
        return result  # type: ignore[return-value]
    if failure is not None and not isinstance(failure, LoSiAError):
        raise failure
    kind, message = everyone[failed[0]]
    alike = [rank for rank in failed if everyone[rank] == everyone[failed[0]]]
    error_type: type[LoSiAError] = getattr(errors, kind, ConfigError)
    raise error_type(message if len(alike) == len(everyone) else f"{_which(alike, len(everyone))}: {message}") from failure


def _which(ranks: list[int], world_size: int) -> str:
    names = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {names} of {world_size}"
