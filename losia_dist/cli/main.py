"""`losia-dist`: one command with subcommands. Every refusal is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from losia_dist.errors import LoSiAError

REFUSED = 2  # exit code


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, from rank 0 alone; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", 0)) == 0:
            _print_error(f"{message} (see {self.prog} --help)")
        sys.exit(REFUSED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `losia-dist`; returns the exit code."""
    parser = Parser(prog="losia-dist", description="LoSiA fine-tuning on any number of GPUs.")
    commands = parser.add_subparsers(dest="command", required=True)
    from losia_dist.training.options import add_training_arguments

    add_training_arguments(commands.add_parser("train", help="fine-tune a causal language model"))
    return run_training(parser.parse_args(arguments))


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of launch/train.py: `losia-dist train` without the word train."""
    from losia_dist.training.options import add_training_arguments

    parser = Parser(description="Fine-tune a causal language model, with LoSiA (--losia) or in full.")
    return run_training(add_training_arguments(parser).parse_args(arguments))


def run_training(options: argparse.Namespace) -> int:
    """Join the other ranks, train, leave; what the package refuses becomes one line, from rank 0, and exit code 2."""
    from losia_dist.training.environment import all_stop, end_process_group, find_place, start_process_group
    from losia_dist.training.run import train

    place, words = find_place(), None
    try:
        words = start_process_group(place, options.timeout)
        train(options, place, words)
    except LoSiAError as error:
        if place.rank == 0:
            _print_error(str(error))
        if all_stop(words):
            end_process_group()
        elif place.rank != 0:
            _print_error(f"rank {place.rank}: {error}")
        return REFUSED
    end_process_group()
    return 0


def _print_error(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
