"""python -m benchmarks.quality: see `command.USAGE`, or --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import header
from benchmarks.methods import NotInstalledError
from benchmarks.quality import sequence
from benchmarks.quality.command import parse, setting_for
from benchmarks.quality.methods import METHODS
from benchmarks.quality.search import run_method, search_rate
from benchmarks.quality.setting import Setting
from benchmarks.quality.store import Store
from benchmarks.quality.summary import REFERENCE, as_table, rate_table, share_of_full, summarize
from benchmarks.quality.tasks import MissingDataError
from benchmarks.quality.training import Bench, run
from benchmarks.quality.variants import VARIANTS, variant_of

Record = dict[str, Any]


class NotStoredError(LookupError):
    """A run is not in the store, and none is to be made."""


class Runner:
    """Makes a run, or takes it from the store; keeps the records of all that were asked for, by task.

    Args:
        bench: what runs are made on; None: none is made.
        make: runs a setting on a bench and returns the result.
    """

    def __init__(self, bench: Bench | None, store: Store, make: Callable[[Bench, Setting], dict[str, Any]] = run) -> None:
        self.bench, self.store, self.make = bench, store, make
        self.asked: dict[str, dict[str, Record]] = {}

    def __call__(self, setting: Setting) -> Record:
        """Raises:
        NotStoredError: the run is not there, and none is made.
        """
        asked, key = self.asked.setdefault(setting.task, {}), json.dumps(setting.to_dict(), sort_keys=True)
        if key in asked:
            return asked[key]
        record = self.store.find(setting)
        found = record is not None
        if record is None:
            if self.bench is None:
                raise NotStoredError(f"rate {setting.rate:.3g}, seed {setting.seed}")
            record = self.store.append(setting, self.make(self.bench, setting), header())
        asked[key] = {**record, "setting": setting.to_dict()}  # as it was asked for: a default may be named, or left out
        print(_line(setting, record["result"], found), flush=True)
        return asked[key]

    def take(self, seeds: Sequence[int], rates: Sequence[float], setting: Setting) -> int:
        """Take every run of these seeds (and rates, if given) that is in the store, whatever a search would ask for."""
        family = [Setting(**record["setting"]) for record in self.store.family(setting)]
        taken = [one for one in family if one.seed in seeds and (not rates or one.rate in rates)]
        for one in taken:
            self(setting.at(rate=one.rate, seed=one.seed))
        return len(taken)

    def records(self, task: str) -> list[Record]:
        """What was asked for of one task, in order."""
        return list(self.asked.get(task, {}).values())


def main(arguments: Sequence[str] | None = None, bench: Bench | None = None) -> dict[str, Any]:
    """Run what the arguments ask for; returns what is stored under --json. `bench` replaces the model that --model names."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    print(header())
    if options.stored:
        bench = None
    elif bench is None:
        bench = Bench.load(options.model, options.data, options.precision)
    runner = Runner(bench, Store(options.runs))
    missing: dict[str, str] = {}
    for task in options.tasks:
        print(f"\n== {task}", flush=True)
        try:
            if bench is not None:
                bench.data(task)
        except MissingDataError as error:
            missing[task] = str(error)
            print(f"{task}: left out: {error}")
            continue
        for setting in _settings(options, task):
            try:
                _run(options, setting, runner)
            except NotInstalledError as error:
                missing[setting.method] = str(error)
                print(f"{setting.method}: not measured: {error}")
            except NotStoredError as error:
                found = runner.take(options.seeds, _rates(options, setting), setting)
                what = f"{task}: {setting.label}"
                missing[what] = f"{found} stored runs; the first that is not there: {error}"
                print(f"{what}: {missing[what]}")
    tasks = [task for task in options.tasks if runner.records(task)]
    results = {**_summary(tasks, runner), "missing": missing}
    if options.sequence:
        results["sequence"] = _sequence(options, tasks, runner)
    if options.json:
        stored = {"header": header(), "share_of_full": results["share_of_full"], "results": results}
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return results


def _settings(options: argparse.Namespace, task: str) -> list[Setting]:
    """First settings of all that is to be compared on a task."""
    if options.ablation is None:
        return [setting_for(options, task, method) for method in options.methods]
    variants = options.ablation or list(VARIANTS)
    return [setting_for(options, task, REFERENCE)] + [setting_for(options, task, "losia", VARIANTS[name]) for name in variants]


def _rates(options: argparse.Namespace, setting: Setting) -> Sequence[float]:
    """Learning rates that were asked for; none, where they are searched: they are the variants', not full fine-tuning's."""
    return [] if options.ablation is not None and setting.method == REFERENCE else options.rates or []


def _run(options: argparse.Namespace, setting: Setting, runner: Runner) -> None:
    centre, rates = METHODS[setting.method].centre, _rates(options, setting)
    if options.sequence:
        search_rate(setting, centre, runner)
    elif rates:
        for rate in rates:
            for seed in options.seeds:
                runner(setting.at(rate=rate, seed=seed))
    else:
        run_method(setting, centre, options.seeds, runner)


def _summary(tasks: Sequence[str], runner: Runner) -> dict[str, Any]:
    entries = {task: summarize(runner.records(task)) for task in tasks}
    for task, found in entries.items():
        names = {label: variant_of(entry["options"]) for label, entry in found.items() if entry["method"] == "losia"}
        shown = {names.get(label) or label: entry for label, entry in found.items()} if len(names) > 1 else found
        print(f"\n{task}\n{as_table(shown)}\n\n{rate_table(runner.records(task))}", flush=True)
    runs = {task: runner.records(task) for task in tasks}
    return {"share_of_full": share_of_full(entries), "tasks": entries, "runs": runs}


def _sequence(options: argparse.Namespace, tasks: Sequence[str], searched: Runner) -> list[Record]:
    """Every method through all tasks, each at the rate that its search found; with every seed."""
    runner = Runner(searched.bench, searched.store, sequence.run_sequence)
    records = []
    for method in options.methods:
        rates = [entry["rate"] for task in tasks if (entry := _entry(searched, task, method)) is not None]
        if len(rates) < len(tasks):
            continue  # a method that is not installed
        setting = sequence.sequence_setting(setting_for(options, tasks[0], method), tasks, rates)
        records += [runner(setting.at(seed=seed)) for seed in options.seeds]
    print(f"\n{sequence.as_table(records)}", flush=True)
    return records


def _entry(runner: Runner, task: str, method: str) -> dict[str, Any] | None:
    return next((entry for entry in summarize(runner.records(task)).values() if entry["method"] == method), None)


def _line(setting: Setting, result: dict[str, Any], found: bool) -> str:
    what = f"{setting.task}: {setting.label} rate {setting.rate:.3g} seed {setting.seed}"
    if "stages" in result:
        return f"{what}: through all tasks" + (" [stored]" if found else "")
    after, forgetting = result["after"]["held_out"], result["forgetting"]
    loss = "not finite" if after is None else f"{after:.4f} (gain {result['gain']:.4f})"
    kept = "" if forgetting is None else f", forgets {forgetting:.4f}"
    score = "" if result["score"] is None else f", score {result['score']:.3f} (before: {result['score_before']:.3f})"
    time = f"{result['seconds_per_step']:.2f} s a step, {result['seconds_of_preparation']:.1f} s before"
    return f"{what}: held-out loss {loss}{kept}{score} [{'stored' if found else time}]"


if __name__ == "__main__":
    main(sys.argv[1:])
