"""What the documentation shows: Python blocks, shell commands in blocks, in running text and in the docstrings of examples."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "benchmarks" / "quality" / "NOTES.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), NOTEBOOK]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = ("python", "torchrun", "deepspeed", "accelerate", "losia-dist", "launch/", "sbatch", "make", "pip", "benchmarks/")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_ASSIGNED = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Command:
    """One command as it stands on a page: settings before it (NODES=2), and its words."""

    page: Path
    text: str
    settings: dict[str, str]
    words: list[str]

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page.stem}: {self.text}"[:100]


def blocks(language: str) -> list[Block]:
    """All blocks of one language, page by page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match.group(1) == language:
                found.append(Block(page, language, text.count("\n", 0, match.start()) + 1, match.group(2)))
    return found


def untold_blocks() -> list[Block]:
    """Blocks of no language, which show output; a command among them would be tried by nobody."""
    return [block for block in blocks("") if any(line.startswith(PROGRAMS) for line in block.text.splitlines())]


def shown_commands() -> list[Command]:
    """Every command of a shell block and of an example's docstring."""
    found = []
    for block in blocks("bash"):
        lines = block.text.replace("\\\n", " ").splitlines()
        commands = [_command(block.page, line) for line in lines if line.strip() and not line.strip().startswith("#")]
        found += _filled(commands)
    for example in EXAMPLES:
        text = (ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or "").replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        assert lines, f"{example} shows no command"
        found += [_command(example, line) for line in lines]
    return found


def inline_commands() -> list[Command]:
    """Commands with options in running text: `losia-dist plan --model ...`. What is optional, [--so], is left out."""
    found = []
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for span in re.findall(r"`([^`]+)`", text):
            if span.startswith(PROGRAMS) and " " in span:
                found.append(_command(page, re.sub(r" \[[^\]]*\]", "", " ".join(span.split()))))
    return found


def _command(page: Path, line: str) -> Command:
    words = shlex.split(line, comments=True)
    settings = {}
    while words and _ASSIGNED.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    return Command(page, re.sub(r"\s+#.*", "", line.strip()), settings, words)


def _filled(commands: list[Command]) -> list[Command]:
    """Commands whose "..." is what the first command of their block has after the option before it."""
    filled = []
    for command in commands:
        words = command.words
        if words[-1] == "...":
            known = commands[0].words
            after = known[known.index("--losia") + 1 :]
            words = [*words[:-1], *after]
        filled.append(Command(command.page, command.text, command.settings, words))
    return filled
