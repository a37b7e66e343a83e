"""Locks of torch's extension loader, behind which DeepSpeed's operators are compiled: told of, and removed once nobody builds.

`torch.utils.cpp_extension` lets one process at a time into an operator's folder by making a file there, `lock`. Whoever is
killed in between leaves the file, and every later start waits for it for ever and without a word. `guard_builds` puts a
`FileBaton` in its place that first takes a lock of the kernel's (`filelock`), which ends with its process, and notes in `lock`
who made it. What it then finds was left behind, unless another host or a program without this package made it: such a file
goes after `COMPILATION_SECONDS` without a change in its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch.utils import file_baton

from losia_dist.ranks.watch.watch import tell

COMPILATION_SECONDS = 1800.0  # that the longest compilation of one file takes, during which nothing in the folder changes
FIRST_WORD_SECONDS = 5.0
_LOOK, _NEXT_WORD = 1.0, 60.0  # seconds; words come at intervals that double
_SHELLS = {"bash", "zsh", "fish", "csh", "tcsh", "ksh"}  # of somebody who looks around; builders' commands are run by "sh"
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # of the machine itself; its /proc shows the processes of all containers too


class GuardedBaton(file_baton.FileBaton):
    """torch's `FileBaton`, that neither waits for the dead nor without a word."""

    def try_acquire(self) -> bool:
        """Make the lock, once nobody else has it: always True.

        torch's own returns False where it has to wait, and then expects the other process to have built. Here everybody
        takes a turn: where nothing is left to build, that takes a moment.
        """
        lock, began, next_word, interval = Path(self.lock_file_path), time.monotonic(), FIRST_WORD_SECONDS, _NEXT_WORD
        self._guard = _guard(lock)
        while reason := self._reason_to_wait(lock):
            waited = time.monotonic() - began
            if waited >= next_word:
                next_word, interval = waited + interval, 2 * interval
                _say(f"waiting since {_clock(time.time() - waited)} ({waited:.0f} s) for {lock}, {reason}.")
            time.sleep(_LOOK)
        lock.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        return True

    def release(self) -> None:
        """Remove the lock."""
        with contextlib.suppress(FileNotFoundError):
            super().release()
        self._guard.release()

    def _reason_to_wait(self, lock: Path) -> str:
        """Empty: the lock is this process's now."""
        try:
            self._guard.acquire(blocking=False)
        except Timeout:
            return f"{_made(lock)[1]}, which lives: it compiles an operator, or loads it"
        except OSError:
            pass  # a file system without locks of the kernel's: torch's own is left
        if super().try_acquire():
            return ""
        is_stale, text = judge(lock)
        if is_stale:
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()
            _say(f"removed {lock}, {text}: left by a start that was killed.")
            if super().try_acquire():
                return ""
        self._guard.release()
        return text


def guard_builds() -> None:
    """Have every extension that this process builds from now on guarded. Nothing is imported, waited for or written yet."""
    file_baton.FileBaton = GuardedBaton  # type: ignore[misc]
    loader: Any = sys.modules.get("torch.utils.cpp_extension")
    if loader is not None:
        loader.FileBaton = GuardedBaton


def stale_locks(root: Path) -> list[str]:
    """Locks under torch's extensions folder behind which nobody builds; nothing is changed."""
    found = []
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with contextlib.suppress(OSError), _guard(lock).acquire(blocking=False):  # Timeout is an OSError: somebody builds
            if judge(lock)[0]:
                found.append(str(lock))
    return sorted(found)


def judge(lock: Path) -> tuple[bool, str]:
    """Whether nobody builds behind a lock any more, and what is known about it, for people. The caller has its guard."""
    try:
        age = time.time() - max(path.stat().st_mtime for path in lock.parent.iterdir() if path.suffix != ".guard")
    except (FileNotFoundError, ValueError):
        age = 0.0  # something has gone just now
    host, made = _made(lock)
    if there := _builder(lock):
        return age > COMPILATION_SECONDS, f"{made}; {there}, and its folder changed {age / 60:.0f} minutes ago"
    if host == socket.gethostname():
        return True, f"{made}, which is gone"
    if host is None and _sees_everybody(lock):
        return True, f"{made}, and no process of this machine has it open"
    if age > COMPILATION_SECONDS:
        return True, f"{made}, and nothing has changed there for {age / 60:.0f} minutes"
    return False, (
        f"{made}; another host or container may be compiling, which cannot be seen from here. It will be removed after "
        f"{COMPILATION_SECONDS / 60:.0f} minutes without a change there ({age / 60:.0f} so far). If nothing compiles: rm {lock}"
    )


def _guard(lock: Path) -> FileLock:
    return FileLock(lock.with_suffix(".guard"), mode=0o666)


def _made(lock: Path) -> tuple[str | None, str]:
    """The host that made a lock, None where it has no note or is gone; and who made it when, for people."""
    try:
        note = json.loads(lock.read_text())
        return note["host"], f"made at {_clock(note['since'])} by process {note['process']} of host {note['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None, "made by another process"


def _builder(lock: Path) -> str:
    """Another process that has the lock open, or works in its folder as compilers do; empty if none is seen."""
    folder = str(lock.parent.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            program = (process / "comm").read_text().strip()
            if program not in _SHELLS and os.readlink(process / "cwd") == folder:
                return f"process {process.name} ({program}) works in its folder"
            for file in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(file) == f"{folder}/lock":
                        return f"process {process.name} has it open"
    return ""


def _sees_everybody(lock: Path) -> bool:
    """Whether /proc shows whoever has this file open: it lies on a disk of this machine, and no container hides anybody."""
    try:
        return os.major(lock.stat().st_dev) != 0 and os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _say(text: str) -> None:
    tell(f"rank {os.environ.get('RANK', '0')} (host {socket.gethostname()}, process {os.getpid()}): {text}")
