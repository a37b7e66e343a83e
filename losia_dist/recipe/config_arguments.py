"""Options of a training script, as functions that add them to any parser."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--losia` and `--losia_config` to a script's parser, as DeepSpeed's function of this name does for its own."""
    group = parser.add_argument_group("LoSiA")
    group.add_argument("--losia", action="store_true", help="train subnets (LoSiA); without it all weights train")
    group.add_argument(
        "--losia_config",
        metavar="NAME|FILE",
        help="a preset (published, short, 7b, 13b, 70b, ...), a YAML or JSON file with LoSiAConfig's fields, "
        "or those as JSON (with --losia)",
    )
    return parser
