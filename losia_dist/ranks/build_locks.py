"""Locks of torch's extension loader, behind which DeepSpeed's operators are compiled: told of, and removed once nobody builds.

`torch.utils.cpp_extension` lets one process at a time into an operator's folder by making a file there, `lock`. Whoever is
killed in between, even while there is nothing to compile, leaves the file, and every later start waits for it for ever and
without a word. `guard_builds` puts a `FileBaton` in its place that

- holds the file locked (flock), with a note of who made it, so that the kernel says when the writer is gone;
- names the file that is waited for, and since when, after a few seconds;
- removes a lock whose writer is gone: this machine's at once, and one of another host or container, where nobody can look,
  after `FOREIGN_SECONDS` (its writer touches it all the time) or, without a note, `COMPILATION_SECONDS` without a change in
  its folder, whoever is there. Compilers that a killed process left behind are waited for;
- compiles again what was cut short.

A lock without a note is that of a process without this package. Who has it open is looked up in /proc.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils import file_baton

from losia_dist.ranks.watch.watch import tell

COMPILATION_SECONDS = 1800.0  # that the longest compilation of one file takes, during which nothing in the folder changes
FOREIGN_SECONDS = 180.0  # network file systems show what another host wrote after a minute
FIRST_WORD_SECONDS = 5.0
_PULSE, _LOOK, _NEXT_WORD = 10.0, 1.0, 60.0  # seconds; words come at intervals that double
# File systems that one machine alone has mounted: whoever has a file open there runs on this one.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay"}
_SHELLS = {"bash", "zsh", "fish", "csh", "tcsh", "ksh"}  # of somebody who looks around; builders' commands are run by "sh"
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # of the machine itself; its /proc shows the processes of all containers too


@dataclass(frozen=True)
class Judgement:
    """Whether nobody builds behind a lock any more, and what is known about it, for people."""

    is_stale: bool
    text: str


class GuardedBaton(file_baton.FileBaton):
    """torch's `FileBaton`, that neither waits for the dead nor without a word."""

    def try_acquire(self) -> bool:
        """Make the lock, once nobody else has it: always True.

        torch's own returns False where it has to wait, and then expects the other process to have built. Here everybody
        takes a turn: where nothing is left to build, that takes a moment.
        """
        waiting = _Waiting(Path(self.lock_file_path))
        while True:
            try:
                descriptor = os.open(self.lock_file_path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
                break
            except FileExistsError:
                waiting.look()
                time.sleep(self.wait_seconds)
        with contextlib.suppress(OSError):  # a file system without flock; then the note says so
            _note(descriptor, is_held=_hold(descriptor, wait=True) is True)
        self._descriptor, self._released = descriptor, threading.Event()
        threading.Thread(target=_pulse, args=(os.dup(descriptor), self._released), daemon=True).start()
        remove_cut_short(Path(self.lock_file_path).parent)
        return True

    def release(self) -> None:
        """Remove the lock, unless somebody else has made it meanwhile."""
        self._released.set()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.lock_file_path), os.fstat(self._descriptor)):
                os.remove(self.lock_file_path)
        os.close(self._descriptor)


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
        with contextlib.suppress(OSError), _opened(lock) as descriptor:
            if judge(lock, descriptor).is_stale:
                found.append(str(lock))
    return sorted(found)


def judge(lock: Path, descriptor: int) -> Judgement:
    """Look who made a lock and whether anybody still builds in its folder.

    Args:
        descriptor: the lock, open. It comes back locked (flock) where nobody else holds it, so that what was seen stays so
            until it is closed.

    Raises:
        OSError: the folder cannot be read.
    """
    status, note = os.fstat(descriptor), _read_note(descriptor)
    made = f"made at {_clock(status.st_mtime if note is None else note['since'])}"
    if note is not None:
        made = f"{made} by process {note['process']} of host {note['host']}"
    is_free = _hold(descriptor, wait=False)
    if is_free is False:
        return Judgement(False, f"{made}, which lives: it compiles an operator, or loads it")
    there, age = _users(lock, status), _unchanged(lock)
    if there:
        text = f"{made}; {there}, and its folder changed {age / 60:.0f} minutes ago"
        return Judgement(age > COMPILATION_SECONDS, text)
    system = _file_system(lock.parent)
    has_booted = note is not None and note["boot"] != _boot()
    if note is not None and note["held"] and is_free and (not has_booted or system in _LOCAL):
        return Judgement(True, f"{made}, which is gone")
    if note is None and system in _LOCAL and _sees_everybody(system, status):
        return Judgement(True, f"{made}, and no process of this machine has it open")
    limit = FOREIGN_SECONDS if note is not None else COMPILATION_SECONDS
    if age > limit:
        return Judgement(True, f"{made}, and nothing has changed there for {age / 60:.0f} minutes")
    return Judgement(
        False,
        f"{made}; another host or container may be compiling, which cannot be seen from here. It will be removed after "
        f"{limit / 60:.0f} minutes without a change there ({age / 60:.0f} so far). If nothing compiles: rm {lock}",
    )


def remove_cut_short(folder: Path) -> None:
    """Delete objects and libraries that are not whole, so that they are built again. The caller has the folder's lock.

    A build that is killed cannot leave them, as ninja writes down what it has finished; a machine that went down can.
    """
    for path in [*folder.glob("*.o"), *folder.glob("*.so")]:
        with contextlib.suppress(FileNotFoundError):
            if not _is_whole(path):
                path.unlink()
                _say(f"removed {path}, which was cut short: it is compiled again.")


class _Waiting:
    """One wait for a lock: looks at it now and then, removes it if it is stale, and says what is waited for."""

    def __init__(self, lock: Path) -> None:
        self._lock, self._began = lock, time.monotonic()
        self._next_look, self._next_word, self._interval = 0.0, FIRST_WORD_SECONDS, _NEXT_WORD

    def look(self) -> None:
        """Called again and again while the lock is there."""
        waited = time.monotonic() - self._began
        if waited < self._next_look:
            return
        self._next_look = waited + _LOOK
        try:
            judgement = self._judge()
        except FileNotFoundError:
            return  # released
        except OSError as error:
            judgement = Judgement(False, f"which cannot be looked at ({error}). If nothing compiles: rm {self._lock}")
        if judgement.is_stale:
            _say(f"removed {self._lock}, {judgement.text}: left by a start that was killed.")
        elif waited >= self._next_word:
            self._next_word = waited + self._interval
            self._interval *= 2
            _say(f"waiting since {_clock(time.time() - waited)} ({waited:.0f} s) for {self._lock}, {judgement.text}.")

    def _judge(self) -> Judgement:
        with _opened(self._lock) as descriptor:
            judgement = judge(self._lock, descriptor)
            if judgement.is_stale:
                # Another rank may have removed it and made its own since: what is open here keeps its number from being used
                # again, and it is locked, so that of all who found it stale one at a time comes here.
                if not os.path.samestat(os.stat(self._lock), os.fstat(descriptor)):
                    raise FileNotFoundError
                os.remove(self._lock)
            return judgement


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR)  # NFS gives an exclusive lock to writers only
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _hold(descriptor: int, wait: bool) -> bool | None:
    """Lock an open file until it is closed. False: somebody else holds it. None: the file system cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _note(descriptor: int, is_held: bool) -> None:
    note = {"process": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "since": time.time(), "held": is_held}
    os.write(descriptor, json.dumps(note).encode())


def _read_note(descriptor: int) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(note, dict) and {"process", "host", "boot", "held"} <= note.keys():
            return {**note, "since": float(note["since"])}
    return None


def _pulse(descriptor: int, released: threading.Event) -> None:
    """Show other hosts that the lock's writer lives. `descriptor` is this thread's own."""
    while not released.wait(_PULSE):
        with contextlib.suppress(OSError):
            os.utime(descriptor)
    os.close(descriptor)


def _boot() -> str:
    """Of this machine's kernel, the same in all of its containers; another one after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _users(lock: Path, status: os.stat_result) -> str:
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
                    # The link's text first: to ask a network file system that hangs about every open file may take long.
                    if os.readlink(file).endswith("/lock") and os.path.samestat(os.stat(file), status):
                        return f"process {process.name} has it open"
    return ""


def _sees_everybody(system: str, status: os.stat_result) -> bool:
    """Whether /proc would show whoever has a file of this machine open."""
    if status.st_uid != os.geteuid() and os.geteuid() != 0:
        return False
    try:
        return system == "overlay" or os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE  # overlay: a container's own
    except OSError:
        return False


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder is on; empty where that is not known."""
    with contextlib.suppress(OSError):
        where, best = os.path.realpath(folder) + "/", ("", "")
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mounted, kind = line.split(" - ", 1)
            point = mounted.split()[4].replace("\\040", " ").rstrip("/") + "/"
            if where.startswith(point) and len(point) >= len(best[0]):
                best = (point, kind.split()[0])
        return best[1]
    return ""


def _unchanged(lock: Path) -> float:
    """Seconds since anything in the lock's folder changed, by the clock of whoever keeps the files."""
    newest = max((path.stat().st_mtime for path in lock.parent.iterdir() if path.suffix != ".now"), default=0.0)
    with tempfile.NamedTemporaryFile(dir=lock.parent, suffix=".now") as now:
        return os.fstat(now.fileno()).st_mtime - newest


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches as far as its headers say: to the end of the section table, and of every segment."""
    with path.open("rb") as file:
        head = file.read(64)
        if sys.platform != "linux" or head[4:5] == b"\x01":
            return True  # of a kind whose header is another
        if len(head) < 64 or head[:4] != b"\x7fELF":
            return False
        order = "<" if head[5] == 1 else ">"
        segments, sections = struct.unpack_from(f"{order}QQ", head, 32)
        segment, segment_count, section, section_count = struct.unpack_from(f"{order}4H", head, 54)
        file.seek(segments)
        table, end = file.read(segment * segment_count), sections + section * section_count
        if len(table) < segment * segment_count:
            return False
        for start in range(0, len(table), segment or 1):
            offset, size = struct.unpack_from(f"{order}Q16xQ", table, start + 8)
            end = max(end, offset + size)
        return bool(end <= os.fstat(file.fileno()).st_size)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _say(text: str) -> None:
    tell(f"rank {os.environ.get('RANK', '0')} (host {socket.gethostname()}, process {os.getpid()}): {text}")
