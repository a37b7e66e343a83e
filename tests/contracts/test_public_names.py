"""Names other people's code calls."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import losia_dist

PACKAGE = Path(losia_dist.__file__).parent


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_public_names_are_there_and_documented():
    for name in losia_dist.__all__:
        value = getattr(losia_dist, name)
        if name == "__version__":
            continue
        assert value.__doc__ and len(value.__doc__) > 30, name
    promised = {"LoSiAConfig", "get_losia_model", "losia_parameter_groups", "LoSiAAdamW", "LoSiA", "initialize"}
    assert promised | {"add_config_arguments", "export_model"} <= set(losia_dist.__all__)
    assert {"LoSiATrainer", "LoSiATrainerMixin", "LoSiACallback"} <= set(losia_dist.__all__)
    assert {"carry_state", "wait_for_saving", "use_chunked_loss", "save_delta", "apply_delta"} <= set(losia_dist.__all__)
    assert {"LoSiAError", "print_trainable_parameters"} <= set(losia_dist.__all__)
    assert {"model", "losia_config", "config", "lr"} <= set(inspect.signature(losia_dist.initialize).parameters)
    assert (PACKAGE / "py.typed").is_file()


def test_every_module_says_what_it_is():
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_package_imports_without_deepspeed(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it now raises
    importlib.reload(losia_dist)


def test_the_package_imports_without_the_trainer_and_accelerate():
    """Their names are there when asked for; asking for another one is an ordinary error."""
    code = "import sys, losia_dist; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    assert not {"transformers.trainer", "accelerate", "trl", "deepspeed"} & set(loaded)
    code = "import sys; sys.modules['accelerate'] = None; from losia_dist import LoSiATrainer"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stderr
    assert (
        failed.splitlines()[-1] == "ImportError: losia_dist.LoSiATrainer needs Accelerate: pip install 'losia_dist[trainer]'."
    )
    with pytest.raises(AttributeError, match="no attribute 'LoSiATrainerr'"):
        _ = losia_dist.LoSiATrainerr
