"""Messages name options and variables that exist."""

import argparse
import ast
import os
import re
from pathlib import Path

import pytest

import losia_dist
from losia_dist.cli.main import COMMANDS, main

PACKAGE = Path(losia_dist.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
# Of SLURM and Docker, which the doctor speaks of.
FOREIGN = {"--ntasks-per-node", "--gpus", "--ipc", "--shm-size", "--ulimit"}
VARIABLE = re.compile(r"\bLOSIA_[A-Z_]+")


def texts() -> dict[str, str]:
    """Every string of the package, by file and line."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found[f"{path.relative_to(PACKAGE)}:{node.lineno}"] = node.value
    return found


def test_options_in_messages_are_options_of_the_commands_or_their_launchers(monkeypatch):
    from accelerate.commands.launch import launch_command_parser
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    known: set[str] = set()
    add = argparse._ActionsContainer.add_argument

    def noted(self, *names, **settings):
        known.update(name for name in names if isinstance(name, str))
        return add(self, *names, **settings)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", noted)
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
    get_args_parser(), launch_command_parser(), parse_args(["train.py"])
    unknown = {place: sorted(set(OPTION.findall(text)) - known - FOREIGN) for place, text in texts().items()}
    assert not {place: names for place, names in unknown.items() if names}


def test_variables_in_messages_are_read_somewhere():
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py")) + "".join(os.environ)
    for place, text in texts().items():
        for name in VARIABLE.findall(text):
            assert re.search(rf'"{name}"', sources), f"{place}: {name}"
