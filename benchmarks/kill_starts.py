"""`python -m benchmarks.kill --starts 20`: starts under DeepSpeed that are killed in their first half minute, and started again.

Each is `deepspeed --num_accelerators 2 launch/train.py --losia ... --resume auto` with an extensions folder of its own, so that
DeepSpeed compiles its operator. At a moment drawn from the first 30 seconds every process of it gets SIGKILL; every second time
the compilers are left, as a rank that is lost leaves them. The same command line is then started once more, and has to train to
its end. Linux, as processes are found in /proc.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import header, table
from tests.support.launching import BIN, ROOT, arguments, make_material

FIRST_SECONDS, LONGEST = 30.0, 600.0
STEPS = 12
_COMPILERS = {"ninja", "sh", "c++", "g++", "cc1plus", "as", "ld", "collect2"}
_COLUMNS = ("start", "killed after", "it was", "left alone", "lock left", "next start", "said within", "took")


@dataclass(frozen=True)
class Place:
    """One start's folders, and the word that all of its processes have in their environment."""

    output: Path
    extensions: Path
    log: Path
    mark: str


def report(starts: int, seed: int) -> int:
    """Kill, start again, print a line for each; 1 if any did not train."""
    chance, rows, failed = random.Random(seed), [], 0
    moments = [chance.uniform(0, FIRST_SECONDS) for _ in range(starts)]
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        material = make_material(Path(directory))
        for number, moment in enumerate(moments):
            where = Path(directory) / f"start-{number}"
            place = Place(where / "run", where / "extensions", where / "log", f"LOSIA_KILLED_START={secrets.token_hex(8)}")
            where.mkdir()
            words = arguments(material, place.output, max_steps=STEPS, save_steps=4, resume="auto", deepspeed=_zero2())
            row, trained = _one(place, words, moment, spares_compilers=number % 2 == 1)
            failed += not trained
            rows.append([number, f"{moment:.1f} s", *row])
            print(*rows[-1], sep=" | ", flush=True)
    print(table(_COLUMNS, rows))
    print(f"{starts - failed} of {starts} starts that followed trained to their end")
    print("killed: " + ", ".join(f"{where} {count}" for where, count in Counter(row[2] for row in rows).most_common()))
    return 1 if failed else 0


def _zero2() -> str:
    return str(ROOT / "configs" / "deepspeed" / "zero2.json")


def _one(place: Place, words: list[str], moment: float, spares_compilers: bool) -> tuple[list[str], bool]:
    began = time.monotonic()
    first = _start(place, words)
    time.sleep(max(0.0, moment - (time.monotonic() - began)))
    was = _where(place)
    spared = _kill(place, spares_compilers)
    first.wait()
    lock = any(place.extensions.rglob("lock"))
    place.log.unlink()
    began = time.monotonic()
    code, said = _follow(_start(place, words), place, began)
    seconds = time.monotonic() - began
    trained = code == 0 and (place.output / "summary.json").is_file()
    if not trained:
        print(place.log.read_text(errors="replace")[-4000:], file=sys.stderr)
    _kill(place, spares_compilers=False)
    alone = ", ".join(f"{name}" for name in sorted(set(spared))) or "-"
    told = "-" if said is None else f"{said:.1f} s"
    return [was, alone, "yes" if lock else "no", "trained" if trained else f"NO ({code})", told, f"{seconds:.0f} s"], trained


def _start(place: Place, words: list[str]) -> subprocess.Popen[bytes]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name, value = place.mark.split("=")
    environment = os.environ | {
        name: value,
        "TORCH_EXTENSIONS_DIR": str(place.extensions),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port), str(ROOT / "launch" / "train.py")]
    with place.log.open("ab") as log:
        return subprocess.Popen([*command, *words], env=environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)


def _follow(process: subprocess.Popen[bytes], place: Place, began: float) -> tuple[int | str, float | None]:
    """Exit code, and seconds from the start to the first line about a lock."""
    said = None
    while process.poll() is None:
        if time.monotonic() - began > LONGEST:
            _kill(place, spares_compilers=False)
            process.wait()
            return f"after {LONGEST:.0f} s", said
        if said is None and "/lock" in place.log.read_text(errors="replace"):
            said = time.monotonic() - began
        time.sleep(0.2)
    return process.returncode, said


def _processes(place: Place) -> dict[int, str]:
    """Processes of a start, wherever they hang in the tree: number -> program."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if place.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "comm").read_text().strip()
    return found


def _where(place: Place) -> str:
    """What a start is doing, by its processes and files."""
    there = _processes(place)
    if not there:
        return "ended"
    if (place.output / "summary.json").is_file():
        return "ending"
    metrics = place.output / "metrics.jsonl"
    if metrics.is_file() and metrics.read_text():
        return "training"
    if _COMPILERS & set(there.values()):
        return "compiling"
    if any(place.extensions.rglob("lock")):
        return "holding the lock"
    if any(place.extensions.rglob("*.so")):
        return "behind the lock"
    # The launcher is two processes, and each rank one.
    return "loading packages" if len(there) >= 4 else "launching"


def _kill(place: Place, spares_compilers: bool) -> list[str]:
    """SIGKILL to all, until none is left; the programs that were spared."""
    quiet, spared = 0, {}
    while quiet < 3:
        there = _processes(place)
        spared = {number: name for number, name in there.items() if spares_compilers and name in _COMPILERS}
        victims = there.keys() - spared.keys()
        for number in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        quiet = 0 if victims else quiet + 1
        time.sleep(0.02)
    return list(spared.values())
