"""`losia-dist doctor`: alone it examines this machine; under a launcher, all ranks together."""

from __future__ import annotations

import argparse
import math


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist doctor`."""
    parser.add_argument("--output_dir", help="the run's: write access, free space, and whether all ranks see one directory")
    parser.add_argument("--model", metavar="DIRECTORY", help="with --output_dir: compare its free space with this model's size")
    parser.add_argument("--losia_config", metavar="FILE", help="the run's: readable, and the same on all ranks")
    parser.add_argument("--deepspeed", metavar="FILE", help="the run's: readable, and the same on all ranks")
    parser.add_argument(
        "--seconds", type=_seconds, default=60.0, help="that ranks wait for each other before they name who did not come (60)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    # The deepspeed launcher passes it; the environment has it too.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def run_doctor(options: argparse.Namespace) -> int:
    """Examine and print; returns 0 (no errors; warnings are possible) or 1. Called by all ranks."""
    from losia_dist.tools.doctor.examination import run

    return run(options)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds between 1 and 3600")
    return seconds
