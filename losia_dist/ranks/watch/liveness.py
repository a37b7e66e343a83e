"""A rank that dies, stops or leaves early ends the others within a minute, with its name, instead of leaving them waiting.

Without it the others sit in a collective for the process group's time limit (10 minutes under NCCL, 30 under gloo, more
where users raised it), and then fail with a message that names no cause. Here every rank's process runs one thread that
tells the first rank every few seconds that it lives and how far it is, and hears the same of it (`heartbeat`).
The thread runs on while the main thread waits in a collective, compiles, saves or sits in a debugger, so those end nothing.

What ends a run, on every rank, with exit code `EXIT_CODE`:
- a process that ended without a word (killed, out of memory, crashed): at once, by its closed connection;
- a process that is silent for the patience (stopped; host or network lost);
- an exception that ends a rank: at once, with its type and message;
- a rank that left (its process ended normally, or `LoSiA.detach`) while another is in a later step, which cannot end
  without it: after the patience, or as soon as the other's collective fails.

A rank whose main thread alone is stuck (a deadlock) beats on, and cannot be told from one that saves for a long time while
the others wait for it: after ten patiences without progress a line says who is waited for, and a run is ended if a limit was
set.

Settings, in the environment and equal on every rank: LOSIA_LIVENESS=0 turns the watch off; LOSIA_LIVENESS_PATIENCE, in seconds
(30); LOSIA_LIVENESS_STALL, in seconds without progress on any rank while one is in a step (no limit).
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch.distributed as dist

from losia_dist.errors import ConfigError
from losia_dist.ranks.watch.heartbeat import Hub, Spoke
from losia_dist.ranks.watch.watch import EXIT_CODE, Limits, Watch, tell

__all__ = ["EXIT_CODE", "Limits", "Watch", "join_watch", "read_limits", "settings"]

_SWITCH, _PATIENCE, _STALL = "LOSIA_LIVENESS", "LOSIA_LIVENESS_PATIENCE", "LOSIA_LIVENESS_STALL"
_DEFAULT_PATIENCE = 30.0  # seconds; longer than C code is known to keep Python's lock, half of the minute promised
_REACH = 10.0  # seconds to connect within

_running: set[Watch] = set()  # every watch whose thread lives; a hub outlives its use while others are connected
_previous_hook: Any = None


def settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment says about the watch, to be compared over the ranks."""
    return {name: environment.get(name, "") for name in (_SWITCH, _PATIENCE, _STALL)}


def read_limits(environment: Mapping[str, str] = os.environ) -> Limits | None:
    """The limits that the environment sets; None: the watch is off.

    Raises:
        ConfigError: a value that is neither a switch nor a number of seconds.
    """
    switch = environment.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ConfigError(f"{_SWITCH}={switch!r} must be 0 (off) or 1 (on, the default).")
    limits = Limits(_seconds(environment, _PATIENCE) or _DEFAULT_PATIENCE, _seconds(environment, _STALL))
    return None if switch == "0" else limits


def _seconds(environment: Mapping[str, str], name: str) -> float | None:
    value = environment.get(name, "")
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds < float("inf"):
        raise ConfigError(f"{name}={value!r} must be a number of seconds, at least 1; leave it out for the default.")
    return seconds


def join_watch(group: dist.ProcessGroup | None) -> Watch | None:
    """This process's watch over the ranks of a group, until it is released. Called by all of them.

    Returns:
        None where there is nothing to watch: one rank, the fake backend, or the watch turned off; and, with a warning from
        the first rank, where some rank cannot reach it.

    Raises:
        ConfigError: the environment's settings are not valid. The caller has compared them over the ranks (`settings`).
    """
    limits = read_limits()
    if group is None or limits is None or dist.get_backend(group) == "fake":
        return None
    ranks, rank, host = tuple(dist.get_process_group_ranks(group)), dist.get_rank(), socket.gethostname()
    lines: Hub | Spoke | None = Hub() if rank == ranks[0] else None
    offer = [lines.invitation if isinstance(lines, Hub) else None]
    dist.broadcast_object_list(offer, group=group, group_src=0)
    invitation, problem = offer[0], ""
    assert invitation is not None
    try:
        lines = lines or Spoke(invitation, {"rank": rank, "host": host, "process": os.getpid()}, ranks[0], _REACH)
    except OSError as error:
        problem = f"rank {rank} (host {host}) cannot reach {error}"
    problems: list[str] = [""] * len(ranks)
    dist.all_gather_object(problems, problem, group=group)
    if lines is not None and not any(problems):
        return _begin(Watch(lines, invitation, ranks, limits, _forget))
    if lines is not None:
        lines.close()
    if rank == ranks[0]:
        tell(
            "the ranks do not watch each other, so a rank that is lost keeps the others waiting: "
            f"{next(filter(None, problems))}. Open the hosts' ports to each other, or set {_SWITCH}=0."
        )
    return None


def _begin(watch: Watch) -> Watch:
    global _previous_hook
    if not _running:
        _previous_hook, sys.excepthook = sys.excepthook, _report
    _running.add(watch)
    watch.start()
    return watch


def _forget(watch: Watch) -> None:
    _running.discard(watch)
    if not _running and sys.excepthook is _report:
        sys.excepthook = _previous_hook


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` while ranks are watched: the traceback as before, then the news to the other ranks."""
    _previous_hook(kind, error, trace)
    for watch in list(_running):
        watch.report(kind, error)


@atexit.register
def _close_all() -> None:
    for watch in list(_running):
        watch.close()
