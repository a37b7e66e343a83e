"""`losia-dist cache`: what tokenized data is kept on this machine, and its deletion."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from losia_dist.errors import ConfigError

_DAY = 24 * 3600


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist cache`."""
    parser.add_argument(
        "--data_cache", metavar="DIRECTORY", help="as for losia-dist train ($LOSIA_DATA_CACHE, or ~/.cache/losia_dist/data)"
    )
    parser.add_argument("--delete_unused", type=float, metavar="DAYS", help="delete what no run has read for so long; 0: all")


def run_cache(options: argparse.Namespace) -> int:
    """List what is kept, or delete what is unused. Returns the exit code. Raises: LoSiAError."""
    from losia_dist.data import cache

    days = options.delete_unused
    if days is not None and days < 0:
        raise ConfigError(f"--delete_unused {days}: give a number of days, 0 or more.")
    directory = Path(options.data_cache or cache.default_directory()).absolute()
    found = cache.kept(directory)
    chosen = [one for one in found if days is None or time.time() - one.used >= days * _DAY]
    for one in chosen:
        if days is not None:
            cache.delete(directory, one.key)
        idle = max(0.0, time.time() - one.used) / _DAY
        print(
            f"{one.key[:12]} {one.size / 1e6:>10,.1f} MB {one.examples:>11,} examples, unused for {idle:.0f} days: {one.source}"
        )
    did = "deleted" if days is not None else "kept"
    print(f"{len(chosen)} of {len(found)} data sets, {sum(one.size for one in chosen) / 1e6:,.1f} MB, {did} in {directory}")
    return 0
