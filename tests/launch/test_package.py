"""The wheel, in an environment that has nothing of the repository: what `pip install losia_dist` gives.

The environment sees the packages of the one that runs the tests (no download), but not its losia_dist.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

from losia_dist import __version__
from losia_dist.cli.configs_command import FOLDERS
from losia_dist.cli.main import COMMANDS
from tests.support.launching import ROOT, arguments

BUILT_FROM = ("losia_dist", *FOLDERS, "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / name)
    words = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", place / "dist", place]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *map(str, words)], check=True, timeout=120)
    (found,) = (place / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program of the fresh environment: installed("losia-dist", "plan", ...) -> what it printed, and its exit code."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    packages = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python")]
    words = ["install", "--ignore-installed", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *words], check=True, timeout=120)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    variables = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RANK", "WORLD_SIZE")
    }
    variables |= {"PATH": f"{place / 'bin'}{os.pathsep}{variables['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def run(program, *words, code=0):
        started = subprocess.run(
            [place / "bin" / program, *map(str, words)],
            capture_output=True,
            text=True,
            env=variables,
            cwd=elsewhere,
            timeout=200,
        )
        assert started.returncode == code, started.stdout[-2000:] + started.stderr[-4000:]
        return started.stdout

    run.place, run.elsewhere = place, elsewhere
    return run


def test_the_wheel_holds_every_file_that_ships(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in FOLDERS:
        there = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert there and {f"losia_dist/shipped/{name}" for name in there} <= set(names)
    assert "losia_dist/config/presets/short.yaml" in names and "losia_dist/tools/report/page.html" in names
    assert not [name for name in names if name.split("/")[0] in (*FOLDERS, "tests", "benchmarks") or name.endswith(".pyc")]


def test_what_was_installed_says_what_it_is(installed):
    assert installed("losia-dist", "--version") == f"losia-dist {__version__}\n"
    assert installed("python", "-m", "losia_dist", "--version") == f"losia-dist {__version__}\n"
    where = installed("python", "-c", "import losia_dist; print(losia_dist.__file__)")
    assert where.startswith(str(installed.place))
    assert "configs/deepspeed/zero3.json" in installed("losia-dist", "configs").splitlines()
    helped = installed("losia-dist", "--help")
    assert all(f"    {name} " in helped for name in COMMANDS)


def test_what_ships_is_copied_and_never_overwritten(installed, tmp_path):
    installed("losia-dist", "configs", "--copy", tmp_path)
    assert (tmp_path / "launch" / "train.py").read_bytes() == (ROOT / "launch" / "train.py").read_bytes()
    assert os.access(tmp_path / "launch" / "torchrun.sh", os.X_OK)
    installed("losia-dist", "configs", "--copy", tmp_path)  # once more changes nothing
    (tmp_path / "configs" / "deepspeed" / "zero2.json").write_text("mine")
    (tmp_path / "launch" / "train.py").unlink()
    installed("losia-dist", "configs", "--copy", tmp_path, code=2)
    assert (tmp_path / "configs" / "deepspeed" / "zero2.json").read_text() == "mine"
    assert not (tmp_path / "launch" / "train.py").exists()


def test_commands_without_torch_start_at_once(installed):
    """0.3 s on an idle machine. Here a process is compared with an empty one and a wide limit, and torch must not be loaded."""
    for words in (["--help"], ["configs"]):
        code = f"import sys; from losia_dist.cli.main import main; sys.argv = ['losia-dist', *{words}]"
        code += "\ntry: main()\nexcept SystemExit: pass\nprint('loaded', {'torch', 'transformers', 'numpy'} & set(sys.modules))"
        assert installed("python", "-c", code).splitlines()[-1] == "loaded set()", words
    began = time.perf_counter()
    installed("losia-dist", "--version")
    assert time.perf_counter() - began < 1.5


@pytest.mark.slow
def test_the_installed_package_trains_plans_exports_and_examines(installed, material, tmp_path):
    run = tmp_path / "run"
    words = arguments(material, run, max_steps=2, save_steps=2, no_save=True, eval_file=None)
    installed("losia-dist", "train", *words)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    installed("losia-dist", "export", run, tmp_path / "model", "--base_model", material["model"])
    load = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; import sys; T.from_pretrained(sys.argv[1])"
    load += "; print(sum(p.numel() for p in M.from_pretrained(sys.argv[1]).parameters()))"
    assert int(installed("python", "-c", load, tmp_path / "model")) > 10_000
    assert json.loads(installed("losia-dist", "plan", "--model", "llama-2-7b", "--json"))["fits"]
    examined = subprocess.run(
        [installed.place / "bin" / "losia-dist", "doctor", "--json"], capture_output=True, text=True, cwd=installed.elsewhere
    )
    assert examined.returncode in (0, 1) and json.loads(examined.stdout)
