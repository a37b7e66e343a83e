"""`losia-dist train`: what every launcher starts, on each rank."""

from __future__ import annotations

import argparse
import sys

from losia_dist.cli.parser import REFUSED, print_error
from losia_dist.errors import LoSiAError
from losia_dist.recipe.options import add_training_arguments
from losia_dist.releases import check_releases


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist train`."""
    add_training_arguments(parser)


def used_extras(options: argparse.Namespace) -> list[str]:
    """Extras of setup.cfg whose packages a run uses."""
    uses = {"deepspeed": options.deepspeed, "quantized": options.quantization in ("nf4", "fp4", "int8")}
    return [extra for extra, is_used in uses.items() if is_used]


def run_train(options: argparse.Namespace) -> int:
    """Join the other ranks, train, leave; what the package refuses becomes one line, from rank 0, and exit code 2.

    Returns 143 where SIGTERM ended the run and a checkpoint was saved: whatever is to follow a finished run must not.
    """
    from losia_dist.ranks.interruption import EXIT_CODE, Interrupted
    from losia_dist.recipe.environment import all_stop, end_process_group, find_process, start_process_group
    from losia_dist.recipe.script import train

    process, agreement_group = find_process(), None
    try:
        check_releases(*used_extras(options))
        agreement_group = start_process_group(process, options.timeout)
        train(options, process, agreement_group)
    except Interrupted as stop:
        if process.rank == 0:
            print(stop, file=sys.stderr, flush=True)
        end_process_group()
        return EXIT_CODE
    except LoSiAError as error:
        if process.rank == 0:
            print_error(str(error))
        if all_stop(agreement_group):
            end_process_group()
        elif process.rank != 0:
            print_error(f"rank {process.rank}: {error}")
        return REFUSED
    end_process_group()
    return 0
