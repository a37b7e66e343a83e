"""One file for a run: `losia-dist train run.yaml`. Its lines are the command's options, and argparse reads them as such."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from losia_dist.config.reading import read_settings
from losia_dist.config.selection import check_known
from losia_dist.errors import ConfigError

ENDINGS = (".yaml", ".yml", ".json")


def with_run_file(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words of a command; those of a run file, where one stands first, before the others, which win.

    Raises:
        ConfigError: the file cannot be read, or holds what the command does not know.
    """
    rest = [word for word in words if not word.startswith("--local_rank")]  # the deepspeed launcher's own, which comes first
    if not is_run_file(rest):
        return [*words]
    return [*options_in(parser, Path(rest[0])), *rest[1:]]


def is_run_file(words: Sequence[str]) -> bool:
    """Whether the first word names a file, and not an option."""
    return bool(words) and not words[0].startswith("-") and words[0].endswith(ENDINGS)


def options_in(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """A run file as words of the command line.

    `losia: true` gives a flag, `micro_batch: 4` an option, a list is several values, false and null leave an option out, and a
    mapping is JSON (of losia_config: settings instead of a file's name).

    Raises:
        ConfigError: as `with_run_file`.
    """
    actions = {name[2:]: action for name, action in parser._option_string_actions.items() if name.startswith("--")}
    values = read_settings(path, "run file")
    known = [name for name, action in actions.items() if action.help != argparse.SUPPRESS and name != "help"]
    check_known(values, known, str(path))
    return [word for name, value in values.items() for word in _words(name, value, actions[name].nargs == 0, path)]


def _words(name: str, value: Any, is_flag: bool, path: Path) -> list[str]:
    if value is None or (is_flag and value is False):
        return []
    if is_flag:
        if value is not True:
            raise ConfigError(f"{path}: {name}: {value!r}: true or false is needed.")
        return [f"--{name}"]
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        return [f"--{name}", *map(_text, value)]
    return [f"--{name}={_text(value)}"]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
