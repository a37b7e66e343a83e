"""A command with all its processes, under watch: how much memory they hold together, and an end before the machine has none.

Twenty times a second `RssAnon` and `RssShmem` of /proc/PID/status are added up over the processes: memory that no file backs,
shared memory once for each process that touched it (an upper bound). Pages mapped from files (`RssFile`: the weights of a
safetensors file, code) can be dropped by the kernel at any time, and are counted apart; `resident` is both together. Every
five seconds smaps_rollup's `Pss_Anon` and `Pss_Shmem`, in which a shared page counts once in all, are added up too. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

GB = 1e9
KINDS = ("own", "pss", "files", "resident", "largest_process")
_PERIOD, _LOOK, _PSS_PERIOD = 0.05, 0.5, 5.0  # seconds between samples, looks for new processes, and readings of smaps_rollup
_SPARE = 0.4 * GB  # of the machine's memory: below it the command is ended, whoever takes the rest
_MARK = "LOSIA_WATCHED"


class Watched:
    """A command that was started. What it says goes to `log`.

    Args:
        limit: bytes; when the processes hold more together, all of them are killed, and `ended` says why.

    Attributes:
        phases: by phase, the most of each of KINDS, in bytes.
        ended: why the guard ended the command; None: it did not.
    """

    def __init__(self, command: Sequence[str], log: Path, limit: float, environment: dict[str, str]) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self.ended: str | None = None
        self.began = time.monotonic()
        self._limit, self._value, self._over, self._phase = limit, secrets.token_hex(8), threading.Event(), ""
        self.enter("start")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment, _MARK: self._value},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def enter(self, phase: str) -> None:
        """Peaks from here on are this phase's, too where it was in it before."""
        self.phases.setdefault(phase, dict.fromkeys(KINDS, 0.0))
        self._phase = phase

    def wait(self, tick: Callable[[], bool] | None = None, every: float = 0.2) -> int:
        """Until the command ended by itself, or `tick`, called again and again, says that it is to be killed; the exit code."""
        while self.process.poll() is None:
            if tick is not None and tick():
                self.kill()
            time.sleep(every)
        self.kill()  # what it may have left
        self._over.set()
        self._thread.join()
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL to every process of the command, until none is left."""
        quiet = 0
        while quiet < 3:
            found = self._processes()
            for number in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            self.process.poll()
            quiet = 0 if found else quiet + 1
            time.sleep(0.02)

    def peak(self, kind: str = "own") -> float:
        """The most of all phases, in bytes."""
        return max(phase[kind] for phase in self.phases.values())

    def _watch(self) -> None:
        looked = read = -1e9
        numbers: list[int] = []
        while not self._over.wait(_PERIOD):
            now = time.monotonic()
            if now - looked > _LOOK:
                numbers, looked = self._processes(), now
            held = [_held(number) for number in numbers]
            found = {
                "own": sum(own for own, _ in held),
                "files": sum(files for _, files in held),
                "resident": sum(own + files for own, files in held),
                "largest_process": max((own for own, _ in held), default=0.0),
            }
            if now - read > _PSS_PERIOD:
                found["pss"], read = sum(_proportional(number) for number in numbers), now
            peaks = self.phases[self._phase]
            for kind, value in found.items():
                peaks[kind] = max(peaks[kind], value)
            if self.ended is None:
                if found["own"] > self._limit:
                    self.ended = f"its processes held {found['own'] / GB:.2f} GB, above the limit of {self._limit / GB:.2f} GB"
                elif _available() < _SPARE:
                    self.ended = (
                        f"the machine had {_available() / GB:.2f} GB left; its processes held {found['own'] / GB:.2f} GB"
                    )
                if self.ended is not None:
                    self.kill()

    def _processes(self) -> list[int]:
        """Every process of the command, wherever it hangs in the tree; not those that are over and only have a number."""
        wanted, found = f"{_MARK}={self._value}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found


def _held(number: int) -> tuple[float, float]:
    """Bytes that no file backs, and bytes that are mapped from files, of one process; 0 where it has ended."""
    sizes = _sizes(Path(f"/proc/{number}/status"))
    return sizes.get("RssAnon", 0.0) + sizes.get("RssShmem", 0.0), sizes.get("RssFile", 0.0)


def _proportional(number: int) -> float:
    sizes = _sizes(Path(f"/proc/{number}/smaps_rollup"))
    return sizes.get("Pss_Anon", 0.0) + sizes.get("Pss_Shmem", 0.0)


def _available() -> float:
    return _sizes(Path("/proc/meminfo")).get("MemAvailable", float("inf"))


def _sizes(path: Path) -> dict[str, float]:
    """Lines "name: number kB" as bytes."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, rest = line.partition(":")
            words = rest.split()
            if len(words) == 2 and words[1] == "kB":
                found[name] = 1024.0 * int(words[0])
    return found
