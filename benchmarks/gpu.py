"""Everything that only a GPU can show, in one run of at most eight minutes: `benchmarks/gpu.sh`.

Tasks run one after the other, the most important first, each in a process of its own with a time of its own: one that hangs
or runs out of memory costs the others nothing. What a task prints as JSON is stored with the task's name at once.
`--rehearse` runs the same tasks at tiny sizes on the CPU, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.common import header, table

ROOT = Path(__file__).parent.parent
_LEAST = 10.0  # seconds below which no further task is begun


@dataclass
class Task:
    """One process: a module of Python with arguments, and the most seconds it may take."""

    name: str
    seconds: float
    command: list[str]
    needs: tuple[str, ...] = ()  # packages without which it is left out, by name


def tasks(rehearse: bool) -> list[Task]:
    """All tasks in order of importance; their times add up to more than a run has, so the last ones may fall away."""
    train = ["-m", "benchmarks.gpu_train", *(["--rehearse"] if rehearse else [])]
    checks = ["-m", "benchmarks.gpu_checks", *(["--rehearse"] if rehearse else [])]
    base = ["1b", "--length", "2048", "--batch", "2"]
    marked = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if _has_gpu_tests(path))
    return [
        Task("tests", 90, ["-m", "pytest", "-q", "-m", "gpu", *marked], needs=("pytest",)),
        Task("nccl", 45, [*checks, "nccl"]),
        Task("1b-2048", 60, [*train, *base]),
        Task("8b-2048", 75, [*train, "8b", "--length", "2048"]),
        Task("8b-4096-checkpointed", 75, [*train, "8b", "--length", "4096", "--checkpointing"]),
        Task("8b-nf4-2048", 60, [*train, "8b-nf4", "--length", "2048"], needs=("bitsandbytes", "peft")),
        Task("moe-2048", 60, [*train, "moe", "--length", "2048"], needs=("peft",)),
        Task("8b-4096-fp8", 60, [*train, "8b", "--length", "4096", "--methods", "losia", "losia-fp8"]),
        Task(
            "1b-2048-compiled",
            75,
            [*train, *base, "--compiled", "--methods", "losia", "full"],
        ),
        Task("8b-2048-full", 45, [*train, "8b", "--length", "2048", "--checkpointing", "--floor-first", "--methods", "full"]),
        Task("deepspeed", 60, [*checks, "deepspeed"], needs=("deepspeed",)),
        Task(
            "8b-16384-checkpointed",
            75,
            [*train, "8b", "--length", "16384", "--checkpointing", "--methods", "losia", "lora64"],
        ),
        Task("1b-4096", 40, [*train, "1b", "--length", "4096"]),
        Task("1b-2048-checkpointed", 40, [*train, *base, "--checkpointing"]),
        Task("8b-2048-checkpointed", 60, [*train, "8b", "--length", "2048", "--checkpointing"]),
        Task("8b-4096", 60, [*train, "8b", "--length", "4096"]),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.jsonl", help="file of JSON lines that results are appended to")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", help="names of the tasks to run, in the usual order")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    chosen = tasks(options.rehearse)
    unknown = sorted(set(options.only or ()) - {task.name for task in chosen})
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: no such task; there are {', '.join(task.name for task in chosen)}")
    if not options.rehearse and not _has_gpu():
        parser.error("no GPU that torch can use was found; --rehearse runs the same tasks at tiny sizes on the CPU")
    began = time.monotonic()
    lines: list[dict[str, Any]] = []
    with Path(options.output).open("a", encoding="utf-8") as output:

        def store(entry: dict[str, Any]) -> None:
            entry = {"at": round(time.monotonic() - began, 1), **entry}
            lines.append(entry)
            output.write(json.dumps(entry) + "\n")
            output.flush()
            os.fsync(output.fileno())
            print(json.dumps(entry), flush=True)

        store({"task": "environment", "rehearsal": options.rehearse, **header()})
        for task in chosen:
            if options.only and task.name not in options.only:
                continue
            left = options.budget - (time.monotonic() - began)
            missing = [package for package in task.needs if importlib.util.find_spec(package) is None]
            if missing:
                store({"task": task.name, "status": f"left out: {', '.join(missing)} is not installed"})
            elif left < _LEAST:
                store({"task": task.name, "status": "left out: no time left"})
            else:
                for entry in run(task, min(task.seconds, left)):
                    store({"task": task.name, **entry})
    print("\n" + summary(lines))
    return lines


def run(task: Task, seconds: float) -> Iterator[dict[str, Any]]:
    """Run a task for at most `seconds`; yields each JSON line it prints as it comes, then how it ended."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, *task.command],
            cwd=ROOT,
            env={**os.environ, "BENCHMARK_SECONDS": str(seconds)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        cut = threading.Event()

        def stop() -> None:
            cut.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        last = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                entry = _parsed(line)
                if entry is not None:
                    yield entry
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
        ended: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        if cut.is_set():
            yield {"status": "cut: its time was over", **ended}
        elif code == 0:
            yield {"status": "done", "said": last if _parsed(last) is None else "", **ended}
        else:
            yield {"status": f"failed with exit status {code}", "error": _tail(errors) or last, **ended}


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """The training measurements as one table, and how each task ended as another."""
    measured = [line for line in lines if "tokens_per_second" in line]
    rows = [
        [line["task"], line["method"], f"{line['tokens_per_second']:,.0f}", f"{line['peak'] / 1e9:.2f}", f"{line['ratio']:.3f}"]
        for line in measured
    ]
    ended = [[line["task"], line["status"]] for line in lines if "status" in line]
    return "\n\n".join(
        [
            table(["task", "method", "tokens/s", "peak, GB", "step / floor's"], rows),
            table(["task", "ended"], ended),
        ]
    )


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _tail(errors: TextIO, size: int = 1500) -> str:
    errors.seek(0)
    return errors.read()[-size:].strip()


def _has_gpu_tests(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
