"""`losia-dist`: one command with subcommands. Every refusal is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from losia_dist.errors import LoSiAError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `losia-dist`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="losia-dist", description="LoSiA fine-tuning on any number of GPUs.")
    commands = parser.add_subparsers(dest="command", required=True)
    from losia_dist.training.options import add_training_arguments

    add_training_arguments(commands.add_parser("train", help="fine-tune a causal language model"))
    return run_training(parser.parse_args(arguments))


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of launch/train.py: `losia-dist train` without the word train."""
    from losia_dist.training.options import add_training_arguments

    parser = argparse.ArgumentParser(description="Fine-tune a causal language model, with LoSiA (--losia) or in full.")
    return run_training(add_training_arguments(parser).parse_args(arguments))


def run_training(options: argparse.Namespace) -> int:
    """Run, and turn what the package refuses into one line and exit code 2."""
    from losia_dist.training.run import train

    try:
        train(options)
    except LoSiAError as error:
        rank = os.environ.get("RANK")
        print(f"losia-dist: error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
