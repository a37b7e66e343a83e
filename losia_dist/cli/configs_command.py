"""`losia-dist configs`: engine configurations, launch files and examples, which an installed package brings along."""

from __future__ import annotations

import argparse
import shutil
from importlib import resources
from pathlib import Path

from losia_dist.errors import ConfigError

# In a checkout these are links to the folders at its root; a wheel holds the files.
SHIPPED = Path(str(resources.files("losia_dist"))) / "shipped"
FOLDERS = ("configs", "launch", "examples")


def add_configs_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist configs`."""
    parser.add_argument("--copy", metavar="DIRECTORY", help="copy them there, to be run from there")


def run_configs(options: argparse.Namespace) -> int | list[Path]:
    """List the files, or copy them; returns the paths that were written.

    Raises:
        ConfigError: a file is there already with another content, or cannot be written; nothing was written then.
    """
    files = [path for folder in FOLDERS for path in sorted(_files(SHIPPED / folder))]
    names = [path.relative_to(SHIPPED) for path in files]
    if options.copy is None:
        print("\n".join(map(str, names)))
        return 0
    target = Path(options.copy)
    for path, name in zip(files, names, strict=True):
        there = target / name
        if there.exists() and not (there.is_file() and there.read_bytes() == path.read_bytes()):
            raise ConfigError(f"{there} is there already, and differs: move it away, or give another directory.")
    try:
        for path, name in zip(files, names, strict=True):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not (target / name).exists():
                shutil.copy(path, target / name)  # with its mode: scripts stay executable
    except OSError as error:
        raise ConfigError(f"--copy {target}: {error}") from error
    return [target / folder for folder in FOLDERS]


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
