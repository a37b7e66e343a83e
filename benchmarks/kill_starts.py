"""`python -m benchmarks.kill --starts 20`: starts under DeepSpeed that are killed in their first half minute.

Each is `deepspeed --num_accelerators 2 launch/train.py --losia ... --resume auto`. Every process of it gets SIGKILL; then the
same command line is started once more, and has to train to its end. All use one extensions folder. The moment is drawn, every
second time from the first 30 seconds, and between those

- every eighth time from 30 seconds of compiling, in an emptied extensions folder; every second one of these leaves the
  compilers alone, as a rank that is lost does;
- else from the third of a second in which the ranks, by turns, hold the lock of what is compiled already. With `--extensions
  FOLDER`, a folder where it is compiled, all of these are.

Linux, as processes are found in /proc.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import header, table
from benchmarks.ranks import free_port
from tests.support.launching import BIN, ROOT, arguments, make_material

FIRST_SECONDS, LOCK_SECONDS, LONGEST = 30.0, 0.3, 1800.0
AIMS = ("compile", "any", "lock", "any", "lock", "any", "lock", "any")
STEPS = 4
ENDED = "ended"
_COMPILERS = {"ninja", "sh", "c++", "g++", "cc1plus", "as", "ld", "collect2"}
_COLUMNS = ("start", "killed after", "it was", "left alone", "lock left", "next start", "it said", "took")


@dataclass(frozen=True)
class StartFiles:
    """One start's folders, and the word that all of its processes have in their environment."""

    output: Path
    extensions: Path
    log: Path
    mark: str


def report(starts: int, seed: int, compiled: Path | None) -> int:
    """Kill, start again, print a line for each; 1 if any did not train. Starts that were over before are made up for."""
    chance, rows, failed, early = random.Random(seed), [], 0, 0
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        material = make_material(Path(directory))
        extensions = (compiled or Path(directory) / "extensions").absolute()
        while len(rows) < starts:
            number = len(rows) + early
            aim, where = AIMS[number % len(AIMS)], Path(directory) / f"start-{number}"
            if aim == "compile" and compiled is not None:
                aim = "lock"
            elif aim == "compile":
                shutil.rmtree(extensions, ignore_errors=True)
            where.mkdir()
            files = StartFiles(where / "run", extensions, where / "log", f"LOSIA_KILLED_START={secrets.token_hex(8)}")
            words = arguments(material, files.output, max_steps=STEPS, save_steps=2, resume="auto", deepspeed=_zero2())
            row, trained = _one(files, words, aim, chance, spares_compilers=number % (2 * len(AIMS)) == len(AIMS))
            failed += not trained
            if row[1] == ENDED and trained:
                early += 1
                continue
            rows.append([number, *row])
            print(*rows[-1], sep=" | ", flush=True)
    print(table(_COLUMNS, rows))
    print(f"{starts - failed} of {starts} starts that followed trained to their end")
    print(f"{early} more were over before they were killed")
    print("killed: " + ", ".join(f"{where} {count}" for where, count in Counter(row[2] for row in rows).most_common()))
    return 1 if failed else 0


def _zero2() -> str:
    return str(ROOT / "configs" / "deepspeed" / "zero2.json")


def _one(
    files: StartFiles, words: list[str], aim: str, chance: random.Random, spares_compilers: bool
) -> tuple[list[str], bool]:
    began = time.monotonic()
    first = _start(files, words)
    known: dict[int, str] = {}
    while aim != "any" and not any(files.extensions.glob("*/lock")) and first.poll() is None:
        if len(known) < 4:
            known = _processes(files)
        time.sleep(0.002)
    time.sleep(chance.uniform(0, LOCK_SECONDS if aim == "lock" else FIRST_SECONDS))
    moment, was = time.monotonic() - began, "holding the lock"
    if aim == "lock":  # over before all processes are looked for
        for number in known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    else:
        was = _where(files)
    spared = _kill(files, spares_compilers)
    first.wait()
    if aim == "lock" and not any(files.extensions.rglob("lock")):
        was = "past the lock"
    lock = any(files.extensions.rglob("lock"))
    files.log.unlink()
    began = time.monotonic()
    code = _follow(_start(files, words), files)
    seconds = time.monotonic() - began
    said = set(re.findall(r"process \d+\): (removed|waiting) .*?/lock", files.log.read_text(errors="replace")))
    trained = code == 0 and (files.output / "summary.json").is_file()
    if not trained:
        print(files.log.read_text(errors="replace")[-4000:], file=sys.stderr)
    _kill(files, spares_compilers=False)
    alone, words_said = (", ".join(sorted(names)) or "-" for names in (set(spared), said))
    told = "trained" if trained else f"NO ({code})"
    return [f"{moment:.1f} s", was, alone, "yes" if lock else "no", told, words_said, f"{seconds:.0f} s"], trained


def _start(files: StartFiles, words: list[str]) -> subprocess.Popen[bytes]:
    name, value = files.mark.split("=")
    environment = os.environ | {
        name: value,
        "TORCH_EXTENSIONS_DIR": str(files.extensions),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    with files.log.open("ab") as log:
        return subprocess.Popen(
            [*launcher, str(ROOT / "launch" / "train.py"), *words],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )


def _follow(process: subprocess.Popen[bytes], files: StartFiles) -> int | str:
    """Exit code, or that it had to be ended."""
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        _kill(files, spares_compilers=False)
        process.wait()
        return f"after {LONGEST:.0f} s"


def _processes(files: StartFiles) -> dict[int, str]:
    """Processes of a start, wherever they hang in the tree: number -> program."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if files.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "comm").read_text().strip()
    return found


def _where(files: StartFiles) -> str:
    """What a start is doing, by its processes and files."""
    there = _processes(files)
    if not there:
        return ENDED
    if (files.output / "summary.json").is_file():
        return "ending"
    metrics = files.output / "metrics.jsonl"
    if metrics.is_file() and metrics.read_text():
        return "training"
    if _COMPILERS & set(there.values()):
        return "building"
    if any(files.extensions.rglob("lock")):
        return "holding the lock"
    return "starting"


def _kill(files: StartFiles, spares_compilers: bool) -> list[str]:
    """SIGKILL to all, until none is left; the programs that were spared."""
    quiet, spared = 0, {}
    while quiet < 3:
        there = _processes(files)
        spared = {number: name for number, name in there.items() if spares_compilers and name in _COMPILERS}
        victims = there.keys() - spared.keys()
        for number in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        quiet = 0 if victims else quiet + 1
        time.sleep(0.02)
    return list(spared.values())
