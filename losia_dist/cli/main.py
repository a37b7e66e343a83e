"""`losia-dist`: one command with subcommands. Every refusal is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from losia_dist._version import __version__
from losia_dist.cli.parser import REFUSED, Parser, print_error
from losia_dist.errors import LoSiAError

_REMOVED = {
    "allocate": "its budgets ended at a loss of 0.8037 where one shape for all layers ended at 0.8025 "
    "(benchmarks/quality/NOTES.md). Set rank_factor; rank_pattern, written by hand, still sets layers apart.",
    "cache": "every data set is a directory of ~/.cache/losia_dist/data, which may be deleted at any time (docs/data.md).",
}


class Command(NamedTuple):
    """A subcommand: what it says of itself, and where `add_NAME_arguments` and `run_NAME` are. The module is imported when the
    command is asked for: not every one needs torch, whose import takes seconds."""

    help: str
    module: str
    takes_run_file: bool = False

    def add_arguments(self, name: str, parser: argparse.ArgumentParser) -> None:
        getattr(importlib.import_module(self.module), f"add_{name}_arguments")(parser)

    def run(self, name: str, options: argparse.Namespace) -> int | Path | list[Path]:
        return getattr(importlib.import_module(self.module), f"run_{name}")(options)  # type: ignore[no-any-return]


COMMANDS = {
    "train": Command("fine-tune a causal language model", "losia_dist.cli.train_command", takes_run_file=True),
    "dpo": Command("tune to preferences: TRL's DPO", "losia_dist.cli.trl_command", takes_run_file=True),
    "kto": Command("tune to judged answers: TRL's KTO", "losia_dist.cli.trl_command", takes_run_file=True),
    "reward": Command("train a reward model by TRL", "losia_dist.cli.trl_command", takes_run_file=True),
    "grpo": Command("reinforcement learning from a reward: TRL's GRPO", "losia_dist.cli.trl_command", takes_run_file=True),
    "init": Command("write a run file for a model on so many GPUs", "losia_dist.cli.init_command"),
    "export": Command("write a checkpoint's model as a plain directory, or as a delta", "losia_dist.cli.export_command"),
    "apply": Command("rebuild a model from its base model and a delta", "losia_dist.cli.export_command"),
    "doctor": Command("examine this machine, or under a launcher the cluster", "losia_dist.cli.doctor_command"),
    "plan": Command("memory, traffic and time of a run on a cluster, before it is rented", "losia_dist.cli.plan_command"),
    "data": Command("what will be learned of a source: records, lengths, what is dropped", "losia_dist.cli.data_command"),
    "report": Command("a page about a run, from the logs in its directory", "losia_dist.cli.report_command"),
    "configs": Command("list or copy what comes with the package", "losia_dist.cli.configs_command"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `losia-dist`; returns the exit code."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    asked = words[0] if words else None
    if asked in _REMOVED:
        print_error(f"losia-dist {asked} was removed: {_REMOVED[asked]}")
        return REFUSED
    parser = Parser(prog="losia-dist", description="LoSiA fine-tuning on any number of GPUs.")
    parser.add_argument("--version", action="version", version=f"losia-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, description=command.help)
        if name == asked:
            command.add_arguments(name, added)
            words[1:] = added.expanded(words[1:]) if command.takes_run_file else words[1:]
    return run_command(parser.parse_args(words))


def run_command(options: argparse.Namespace) -> int:
    """Run what the options name; returns the exit code."""
    name: str = options.command
    try:
        done: Any = COMMANDS[name].run(name, options)
    except LoSiAError as error:
        print_error(str(error))
        return REFUSED
    if isinstance(done, int):
        return done
    for path in done if isinstance(done, list) else [done]:
        print(f"written: {path}")
    return 0


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of launch/train.py: `losia-dist train` without the word train."""
    from losia_dist.cli.train_command import add_train_arguments, run_train

    parser = Parser(description="Fine-tune a causal language model, with LoSiA (--losia) or in full.")
    add_train_arguments(parser)
    return run_train(parser.parse_args(parser.expanded(sys.argv[1:] if arguments is None else arguments)))
