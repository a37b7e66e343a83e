"""The worked examples of docs/inside.md: each patch applies to this version of the package, and what stands below it runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.cases import only
from tests.support.documents import ROOT
from tests.support.shown import make_place

PAGE = (ROOT / "docs" / "inside.md").read_text(encoding="utf-8")
LONGEST = 40  # lines of a patch


class Example(NamedTuple):
    """A section of the page with its patch and the lines that use it."""

    title: str
    patch: str
    lines: str


def _examples() -> list[Example]:
    found = []
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        blocks = (re.findall(rf"^```{kind}\n(.*?)^```", section, re.DOTALL | re.MULTILINE) for kind in ("diff", "python"))
        patches, lines = blocks
        assert len(patches) == len(lines) == 1, f"{title!r} needs one diff and one python block"
        found.append(Example(title, patches[0], lines[0]))
    return found


EXAMPLES = _examples()


def test_the_examples_are_all_of_the_pages_blocks():
    assert [example.title for example in EXAMPLES] == ["A new importance score", "A new engine", "A new data form"]
    assert len(re.findall(r"^```(?:diff|python)$", PAGE, re.MULTILINE)) == 2 * len(EXAMPLES)


def test_the_files_it_names_are_there():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE))
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).is_file() and not (ROOT / "losia_dist" / name).is_file()]


def patch(example, directory):
    """A copy of the package with an example's patch in it, and the environment that finds it."""
    assert len(example.patch.splitlines()) < LONGEST
    patched = directory / "patched"
    shutil.copytree(ROOT / "losia_dist", patched / "losia_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "example.diff").write_text(example.patch, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(patched), "GIT_CEILING_DIRECTORIES": str(directory), "HF_HUB_OFFLINE": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    applied = _run(["git", "apply", "--verbose", str(directory / "example.diff")], patched, environment)
    assert applied.returncode == 0, applied.stdout
    return patched, environment


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_an_example_applies(example, tmp_path):
    patch(example, tmp_path)


@pytest.mark.parametrize("example", only(["A new data form"], {example.title: example for example in EXAMPLES}))
def test_a_patched_package_runs_what_stands_below_the_patch(example, tmp_path):
    patched, environment = patch(example, tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    own = f"import losia_dist\n\nassert losia_dist.__file__.startswith({str(patched)!r})\n"
    (tmp_path / "lines.py").write_text(own + example.lines, encoding="utf-8")
    ran = _run([sys.executable, str(tmp_path / "lines.py")], make_place(place), environment)
    assert ran.returncode == 0, ran.stdout


def _run(command: list[str], directory: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240
    )
