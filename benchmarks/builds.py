"""Two builds of this package by turns in one run: what each takes beyond the floor, and keeps for backward.

    git worktree add ../before 293673e
    python -m benchmarks.builds --other ../before [--forms published short] [--dtype fp32 bf16] [--rounds 40]

Each build has a process; one alone computes at a time, and which comes first is drawn each time. A step lies between two of the
floor in the same process (the same model frozen, forward and dx), and its ratio is to their mean. Steps that end a slot are
counted with the others: with `--rounds` a whole number of cycles the mean is that of a cycle. `--set NAME=VALUE` changes this
build's configuration alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, header, read_results, table, write_json
from benchmarks.timing import median_interval

HERE = Path(__file__).resolve().parent
# In the flat form that every build reads.
FORMS: dict[str, dict[str, Any]] = {
    "published": {"rank_factor": 0.125, "period": 5, "layers_per_slot": 1},
    "short": {"rank_factor": [1.0, 0.0625], "period": 2, "layers_per_slot": 1, "selection": "random", "rewarm_steps": 0},
}
BUILDS = ("this", "other")


class Build:
    """A process that steps when it is asked to."""

    def __init__(self, checkout: Path, setting: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "build_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=checkout,
            text=True,
        )
        self.kept = self._ask(json.dumps(setting))["kept"]

    def step(self, method: str) -> dict[str, Any]:
        """seconds, ended_slot and peak of one step of "floor" or "losia"."""
        return self._ask(method)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a build ended with exit status {self._process.wait()}; its own output stands above.")
        return dict(json.loads(answer))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of the other build")
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=40, help="steps of each build")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs=2, default=[2, 512], metavar=("ROWS", "TOKENS"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of this build's configuration")
    parser.add_argument("--json", default=str(RESULTS / "builds.json"))
    options = parser.parse_args(arguments)
    if not (options.other / "losia_dist").is_dir():
        raise SystemExit(f"--other {options.other}: no losia_dist in there. Give a checkout, such as one by git worktree add.")
    print(header())
    results = read_results(options.json) if Path(options.json).is_file() else []
    for form in options.forms:
        for dtype in options.dtype:
            results.append(compare(form, dtype, options))
            print("\n" + as_table(results[-1]), flush=True)
            write_json(options.json, results)
    return results


def compare(form: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of both builds in one form and dtype."""
    changed = dict(one.split("=", 1) for one in options.set)
    setting: dict[str, Any] = {
        "dtype": dtype,
        "batch": options.batch,
        "threads": options.threads,
        "config": FORMS[form],
        "model": {
            "vocab_size": 4096,
            "hidden_size": options.hidden,
            "intermediate_size": options.hidden * 11 // 4,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.hidden // 64,
            "num_key_value_heads": options.hidden // 64,
            "max_position_embeddings": options.batch[1],
        },
    }
    own = {**setting, "config": {**FORMS[form], **{name: json.loads(value) for name, value in changed.items()}}}
    places = {"this": HERE.parent, "other": options.other.resolve()}
    builds = {name: Build(places[name], own if name == "this" else setting) for name in BUILDS}
    found: dict[str, Any] = {name: {"ratios": [], "kept": builds[name].kept} for name in BUILDS}
    order = random.Random(0)
    for build in builds.values():
        build.step("losia")
        build.step("floor")
    for _ in range(options.rounds):
        for name in order.sample(BUILDS, 2):
            before, step, after = (builds[name].step(method) for method in ("floor", "losia", "floor"))
            found[name]["ratios"].append(round(2 * step["seconds"] / (before["seconds"] + after["seconds"]), 4))
            found[name]["peak"] = step["peak"]
    for build in builds.values():
        build.end()
    return {"form": form, "set": changed, **setting, "builds": found}


def as_table(entry: dict[str, Any]) -> str:
    """Mean and median ratio to the floor, what lies beyond it, and bytes."""
    rows = []
    for name in BUILDS:
        ratios, kept = entry["builds"][name]["ratios"], entry["builds"][name]["kept"]
        low, high = median_interval(ratios)
        middle = [statistics.fmean(ratios), statistics.median(ratios)]
        rows.append([name, *(f"{value:.3f}" for value in middle), f"{low:.3f} to {high:.3f}", f"{kept / 2**20:.1f}"])
    lines = table(["build", "mean of all steps / floor", "median", "95 % interval", "kept for backward, MiB"], rows)
    return f"{entry['form']}, {entry['dtype']}, {entry['set'] or 'nothing set'}\n{lines}"


if __name__ == "__main__":
    main()
