"""The parser of every command: its errors are one line, and a run file may stand in the place of its options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from losia_dist.errors import LoSiAError
from losia_dist.recipe.run_file import ENDINGS, with_run_file

REFUSED = 2  # exit code


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, from rank 0 alone; the usage is for --help."""

    run_file: str | None = None  # that options were read from

    def error(self, message: str) -> NoReturn:
        where = "" if self.run_file is None else f"; options of {self.run_file} are read before those beside it"
        refuse(f"{message} (see {self.prog} --help{where})")

    def expanded(self, words: Sequence[str]) -> list[str]:
        """The words with a run file's, where one stands first. Refuses a file that cannot be used."""
        try:
            found = with_run_file(self, words)
        except LoSiAError as error:
            refuse(str(error))
        self.run_file = next((word for word in words if word.endswith(ENDINGS)), None) if found != [*words] else None
        return found


def refuse(message: str) -> NoReturn:
    """One line on standard error, from rank 0 alone, and the exit code of refusals."""
    if int(os.environ.get("RANK", 0)) == 0:
        print_error(message)
    sys.exit(REFUSED)


def print_error(message: str) -> None:
    """One line on standard error."""
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
