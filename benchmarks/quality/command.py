"""The benchmark's command line: forms, options, and the settings that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS
from benchmarks.quality.loss import PRECISIONS
from benchmarks.quality.methods import METHODS
from benchmarks.quality.setting import Setting, parse_options
from benchmarks.quality.variants import VARIANTS

USAGE = """Fine-tuning quality, beside what a user would pick instead.

    python -m benchmarks.quality [--form short] [--methods losia lora ...] [--tasks gsm8k reasoning FILE.jsonl]
    python -m benchmarks.quality --methods losia --rates 1e-3 2e-3 --seeds 0 1 --set losia.rank_factor=0.25
    python -m benchmarks.quality --ablation [NAME ...] [--rates 1e-3]
    python -m benchmarks.quality --sequence --methods losia lora full
    python -m benchmarks.quality --stored

Every finished run is appended to --runs at once, and a run that is there is not made again: an interrupted night goes on
where it stopped. With --rates there is no search: every method (of an ablation, every variant) runs at these rates with
every seed.
"""


@dataclass(frozen=True)
class Form:
    """What is run where nothing else is asked for. scored: held-out problems that are answered and scored, by task."""

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    scored: int


_COMPARED = ("full", "lora", "dora", "galore", "random", "losia_published", "losia")
FORMS = {
    "short": Form(("full", "lora", "losia_published", "losia"), ("gsm8k",), (0,), 0),
    "overnight": Form(_COMPARED, ("gsm8k", "reasoning"), (0, 1, 2), 32),
    "ablation": Form(("losia",), ("gsm8k",), (0,), 0),
    "sequence": Form(("full", "lora", "losia_published", "losia"), ("gsm8k", "reasoning"), (0,), 0),
}
JSON = {"short": "quality", "overnight": "quality", "ablation": "quality_ablation", "sequence": "quality_sequence"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what the form sets filled in; `options.form` also is "ablation" or "sequence"."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.quality", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=("short", "overnight"), default="overnight", help="short: 30 minutes on 2 cores")
    parser.add_argument("--ablation", nargs="*", metavar="NAME", help=f"variants of LoSiA (all): {'; '.join(VARIANTS)}")
    parser.add_argument("--sequence", action="store_true", help="train through the tasks one after the other")
    parser.add_argument("--methods", choices=METHODS, nargs="+", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--tasks", nargs="+", help="gsm8k, reasoning, or a file of instructions")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--batch", type=int, help="problems a step, instead of the task's own number")
    parser.add_argument("--rates", type=float, nargs="+", help="run at these learning rates, without a search")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.OPTION=VALUE", help="may be given again")
    parser.add_argument("--scored", type=int, help="held-out problems to answer and score")
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="fp32 where bf16 is slow, as on CPUs without it"
    )
    parser.add_argument("--data", type=Path, default=Path("quickstart"), help="directory of the quickstart's data")
    parser.add_argument("--runs", default=str(RESULTS / "quality_runs.jsonl"), help="where finished runs are kept")
    parser.add_argument("--stored", action="store_true", help="make no run: summarize those that are there, say what is not")
    parser.add_argument(
        "--json", help="where the summary goes; default: with the results, but with --rates or --stored nowhere"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.ablation is not None and options.sequence:
        parser.error("--ablation and --sequence are two benchmarks: give one of them.")
    if options.stored and options.sequence:
        parser.error("--stored summarizes single runs, and a sequence is one run: leave --sequence out.")
    if options.ablation is not None:
        options.form = "ablation"
        unknown = [name for name in options.ablation if name not in VARIANTS]
        if unknown:
            parser.error(f"--ablation {unknown[0]!r} is no variant; there are: {'; '.join(VARIANTS)}")
    elif options.sequence:
        options.form = "sequence"
        if options.rates:
            parser.error("--sequence trains each task at the rate that a search finds for it: leave --rates out.")
    form = FORMS[options.form]
    for name in ("methods", "tasks", "seeds", "scored"):
        if getattr(options, name) is None:
            setattr(options, name, list(getattr(form, name)) if name != "scored" else form.scored)
    options.set = parse_options(options.set)
    unknown = sorted(set(options.set) - set(options.methods))
    if unknown:
        parser.error(f"--set names {', '.join(unknown)}, which is not among the methods that run: {', '.join(options.methods)}")
    if options.json is None and not options.rates and not options.stored:
        options.json = str(RESULTS / f"{JSON[options.form]}.json")
    return options


def setting_for(options: argparse.Namespace, task: str, method: str, more: dict[str, Any] | None = None) -> Setting:
    """The setting of a method's first run on a task: at the centre of its search, with the first seed."""
    own = {**options.set.get(method, {}), **(more or {})}
    known = METHODS[method]
    return Setting(
        task=task,
        method=method,
        rate=known.centre,
        seed=options.seeds[0],
        steps=options.steps,
        batch=options.batch,
        options=own,
        scored=options.scored,
        model=options.model,
        precision=options.precision,
        resolved=known.resolve(known.options(own)),
    )
