"""`losia-dist`: one command with subcommands. Every refusal is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from losia_dist.errors import LoSiAError

REFUSED = 2  # exit code
_REMOVED = {
    "allocate": "its budgets ended at a loss of 0.8037 where one shape for all layers ended at 0.8025 "
    "(benchmarks/quality/NOTES.md). Set rank_factor; rank_pattern, written by hand, still sets layers apart.",
    "cache": "every data set is a directory of ~/.cache/losia_dist/data, which may be deleted at any time (docs/data.md).",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, from rank 0 alone; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", 0)) == 0:
            _print_error(f"{message} (see {self.prog} --help)")
        sys.exit(REFUSED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `losia-dist`; returns the exit code."""
    parser = Parser(prog="losia-dist", description="LoSiA fine-tuning on any number of GPUs.")
    for command in [*(sys.argv[1:] if arguments is None else arguments)][:1]:
        if command in _REMOVED:
            _print_error(f"losia-dist {command} was removed: {_REMOVED[command]}")
            return REFUSED
    commands = parser.add_subparsers(dest="command", required=True)
    from losia_dist.cli.data_command import add_data_arguments, run_data
    from losia_dist.cli.doctor_command import add_doctor_arguments, run_doctor
    from losia_dist.cli.export_command import add_apply_arguments, add_export_arguments, run_apply, run_export
    from losia_dist.cli.plan_command import add_plan_arguments, run_plan
    from losia_dist.cli.report_command import add_report_arguments, run_report
    from losia_dist.recipe.options import add_training_arguments

    table: list[tuple[str, str, Callable[[Any], object], Callable[[argparse.Namespace], int | Path | list[Path]]]] = [
        ("train", "fine-tune a causal language model", add_training_arguments, run_training),
        ("export", "write a checkpoint's model as a plain directory, or as a delta", add_export_arguments, run_export),
        ("apply", "rebuild a model from its base model and a delta", add_apply_arguments, run_apply),
        ("doctor", "examine this machine, or under a launcher the cluster", add_doctor_arguments, run_doctor),
        ("plan", "memory, traffic and time of a run on a cluster, before it is rented", add_plan_arguments, run_plan),
        ("data", "what will be learned of a source: records, lengths, what is dropped", add_data_arguments, run_data),
        ("report", "a page about a run, from the logs in its directory", add_report_arguments, run_report),
    ]
    for name, help, add_arguments, _ in table:
        add_arguments(commands.add_parser(name, help=help))
    options = parser.parse_args(arguments)
    try:
        done = {name: run for name, _, _, run in table}[options.command](options)
    except LoSiAError as error:
        _print_error(str(error))
        return REFUSED
    if isinstance(done, int):
        return done
    for path in done if isinstance(done, list) else [done]:
        print(f"written: {path}")
    return 0


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of launch/train.py: `losia-dist train` without the word train."""
    from losia_dist.recipe.options import add_training_arguments

    parser = Parser(description="Fine-tune a causal language model, with LoSiA (--losia) or in full.")
    return run_training(add_training_arguments(parser).parse_args(arguments))


def run_training(options: argparse.Namespace) -> int:
    """Join the other ranks, train, leave; what the package refuses becomes one line, from rank 0, and exit code 2.

    Returns 143 where SIGTERM ended the run and a checkpoint was saved: whatever is to follow a finished run must not.
    """
    from losia_dist.ranks.interruption import EXIT_CODE, Interrupted
    from losia_dist.recipe.environment import all_stop, end_process_group, find_process, start_process_group
    from losia_dist.recipe.script import train

    process, agreement_group = find_process(), None
    try:
        agreement_group = start_process_group(process, options.timeout)
        train(options, process, agreement_group)
    except Interrupted as stop:
        if process.rank == 0:
            print(stop, file=sys.stderr, flush=True)
        end_process_group()
        return EXIT_CODE
    except LoSiAError as error:
        if process.rank == 0:
            _print_error(str(error))
        if all_stop(agreement_group):
            end_process_group()
        elif process.rank != 0:
            _print_error(f"rank {process.rank}: {error}")
        return REFUSED
    end_process_group()
    return 0


def _print_error(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
