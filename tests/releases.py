"""`make test-releases`: a core of the tests with the oldest and with the newest releases that setup.cfg admits.

    python tests/releases.py oldest newest

Makes an environment for each (`.venv-oldest`, `.venv-newest`), installs into it, runs the core and prints a table of what was
installed and what passed. The oldest releases are the lower bounds of setup.cfg; the newest are what pip finds.
"""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("deepspeed", "trl", "quantized")
# Beside what setup.cfg names: what the core itself runs with, at any release.
TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "peft>=0.17")
SHOWN = ("torch", "transformers", "accelerate", "trl", "deepspeed", "datasets", "peft", "bitsandbytes", "safetensors", "numpy")
# Engines against the dense reference, resume, export, compile, Trainer and TRL: what reads the insides of other packages.
CORE = (
    "tests/parity/test_engines.py",
    "tests/parity/test_compile.py",
    "tests/parity/test_drawn_subnets.py",
    "tests/parity/test_experts.py",
    "tests/parity/test_quantized.py",
    "tests/checkpoint/test_resume.py",
    "tests/checkpoint/test_export.py",
    "tests/integrations/test_trainer_parity.py",
    "tests/integrations/test_trl.py",
    "tests/integrations/test_accelerate_loop.py",
    "tests/unit/test_model_families.py",
)


def requirements(which: str) -> list[str]:
    """What pip is to install: the lower bound of each requirement, or each as it stands."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [parser["options"]["install_requires"], *(parser["options.extras_require"][extra] for extra in EXTRAS)]
    lines = [line.split("#")[0].strip() for text in texts for line in text.splitlines()]
    wanted = {line.partition(">=")[0]: line for line in lines if line}  # an extra's own bound is the higher one
    return [line if which == "newest" else _oldest(line) for line in wanted.values()]


def _oldest(requirement: str) -> str:
    """`name>=1.2,<2` as `name==1.2.*`: the oldest minor release, with its fixes."""
    name, bound, rest = requirement.partition(">=")
    if not bound:
        return requirement
    version = rest.split(",")[0].strip()
    return f"{name}=={version}.*" if version.count(".") < 2 else f"{name}=={version}"


def environment(which: str) -> Path:
    """The environment's python, with everything installed. Raises: CalledProcessError where pip finds no set that fits."""
    place = ROOT / f".venv-{which}"
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "setuptools>=77", "wheel", *requirements(which), *TOOLS], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], check=True)
        (place / ".ready").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """What is installed there, by name."""
    code = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]))"
    found = subprocess.run([str(python), "-c", code, *SHOWN], check=True, capture_output=True, text=True).stdout.split()
    inside = subprocess.run([str(python), "-V"], check=True, capture_output=True, text=True).stdout.split()[1]
    return {"python": inside, **dict(zip(SHOWN, found, strict=True))}


def run_core(python: Path) -> tuple[int, str]:
    """(exit status, pytest's last line)."""
    words = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not slow and not gpu", *CORE]
    settings = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        # What DeepSpeed compiles belongs to one release of torch, and its usual place is the same for all.
        "TORCH_EXTENSIONS_DIR": str(python.parent.parent / "torch_extensions"),
    }
    found = subprocess.run(words, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    sys.stdout.write("".join(line + "\n" for line in found.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))))
    return found.returncode, (found.stdout.strip().splitlines() or [found.stderr.strip()])[-1].strip("= ")


def main() -> None:
    names = sys.argv[1:] or ["oldest", "newest"]
    if any(name not in ("oldest", "newest") for name in names):
        raise SystemExit(f"{' '.join(names)}: give oldest, newest or both.")
    columns, passed, worst = [], [], 0
    for name in names:
        python = environment(name)
        columns.append(versions(python))
        status, line = run_core(python)
        passed.append(line)
        worst = worst or status
    print("|  | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for package in ("python", *SHOWN):
        print(f"| {package} | " + " | ".join(found[package] for found in columns) + " |")
    print("| core tests | " + " | ".join(passed) + " |")
    raise SystemExit(worst)


if __name__ == "__main__":
    main()
