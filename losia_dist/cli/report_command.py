"""`losia-dist report`: a page about one run, from the logs in its directory. One process, no GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

PAGE = "report.html"


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist report`."""
    parser.add_argument(
        "run",
        nargs="+",
        metavar="RUN_DIRECTORY",
        help="output_dir of losia-dist train, or of a Trainer; of several the first is shown, and the others beside it",
    )
    parser.add_argument("--output", metavar="FILE", help=f"the page, one HTML file (RUN_DIRECTORY/{PAGE})")
    parser.add_argument("--png", metavar="DIRECTORY", help="write every figure as a PNG too")
    parser.add_argument("--compare", metavar="RUN", nargs="+", default=[], help="draw the losses of these runs beside it")


def run_report(options: argparse.Namespace) -> list[Path]:
    """Write the page and the pictures; returns their paths, the page first.

    Raises:
        LoSiAError: no such run, nothing logged, matplotlib missing, or a file that cannot be written.
    """
    from losia_dist.tools.report.write_report import write_report

    run, *others = map(Path, options.run)
    output = Path(options.output) if options.output else run / PAGE
    return write_report(run, output, Path(options.png) if options.png else None, [*others, *map(Path, options.compare)])
