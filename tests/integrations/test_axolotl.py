"""The plugin for axolotl: with stand-ins for its two classes, and with axolotl itself in an environment of its own
(`make test-axolotl`), as it pins other releases of Transformers, TRL and Accelerate."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.integrations.trainer.trainer import LoSiATrainer
from tests.support.launching import ROOT, make_material
from tests.support.models import tiny_llama
from tests.support.trainers import fresh_accelerate

BIN = os.environ.get("LOSIA_AXOLOTL_BIN")
NAME = "losia_dist.integrations.axolotl"
SETTINGS = {"rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "rewarm_steps": 1}


@pytest.fixture
def plugin(monkeypatch):
    """The module, over stand-ins for axolotl's classes."""
    for name in ("axolotl", "axolotl.core", "axolotl.core.trainers", "axolotl.core.trainers.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.core.trainers.base"].AxolotlTrainer = type("AxolotlTrainer", (Trainer,), {})
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def trained(cls, directory, **losia):
    arguments = TrainingArguments(str(directory), max_steps=4, report_to="none", save_strategy="no", logging_steps=1, seed=0)
    rows = torch.arange(3, 67).reshape(8, 8).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = cls(model=tiny_llama(), args=arguments, train_dataset=data, **losia)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_plugins_trainer_trains_as_losia_trainer_and_saves_a_plain_model_once(plugin, tmp_path):
    cfg = {"losia": SETTINGS, "output_dir": str(tmp_path / "saved")}
    with fresh_accelerate():
        one = plugin.LoSiAPlugin()
        one.register(cfg)
        trainer, losses = trained(one.get_trainer_cls(cfg), tmp_path / "plugin")
        one.post_trainer_create(cfg, trainer)
        one.post_train(cfg, trainer.model)
        written = (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns
        trainer.model.save_pretrained(tmp_path / "saved")  # axolotl's own, which a converted model refuses
        one.post_train(cfg, trainer.model)  # axolotl calls it again, when the ranks have parted
        assert (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns == written
        trainer.losia.detach()
    with fresh_accelerate():
        own, expected = trained(LoSiATrainer, tmp_path / "own", losia_config=LoSiAConfig.from_dict(SETTINGS))
        own.save_model(tmp_path / "expected")
        own.losia.detach()
    assert losses == expected
    saved, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "expected"))
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "cfg, words",
    [
        ({}, "`losia:` is missing"),
        ({"losia": {"periods": 3}}, "losia: unknown option 'periods'"),
        ({"losia": "tiny"}, "tiny"),
        ({"losia": "short", "adapter": "lora"}, "adapter: lora is not supported"),
        ({"losia": "short", "load_in_4bit": True}, "load_in_4bit.*load in bf16"),
        ({"losia": "short", "rl": "dpo"}, "rl: dpo.*losia-dist dpo"),
        ({"losia": "short", "reward_model": True}, "losia-dist reward"),
    ],
)
def test_what_losia_does_not_do_is_refused_before_anything_is_read(plugin, cfg, words):
    with pytest.raises((ConfigError, UnsupportedError), match=words):
        plugin.LoSiAPlugin().register(cfg)


def test_the_shipped_file_names_the_plugin_and_settings_that_load():
    settings = yaml.safe_load((ROOT / "configs" / "axolotl" / "losia.yaml").read_text())
    assert settings["plugins"] == [f"{NAME}.LoSiAPlugin"]
    LoSiAConfig.from_dict(settings["losia"])


def run_axolotl(directory: Path, material, launcher, **changed):
    """axolotl's own command on the shipped file with a tiny model; returns what it printed."""
    settings = yaml.safe_load((ROOT / "configs" / "axolotl" / "losia.yaml").read_text())
    settings |= {"base_model": str(material["model"]), "losia": SETTINGS, "output_dir": str(directory / "run")}
    settings |= {"sequence_len": 64, "max_steps": 6, "learning_rate": 3e-3, "lr_scheduler": "constant", "warmup_steps": 0}
    settings |= {
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "seed": 0,
        "shuffle_merged_datasets": False,
    }
    settings |= {"shuffle_merged_datasets": False, "dataset_prepared_path": str(directory / "prepared"), **changed}
    settings["datasets"][0]["path"] = str(material["chat"])
    settings["plugins"].append("tests.support.axolotl_on_cpu.OnCPU")
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    variables = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    variables |= {"AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [f"{BIN}/axolotl", "train", str(directory / "run.yaml"), *launcher]
    ended = subprocess.run(words, capture_output=True, text=True, env=variables, cwd=directory, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout + ended.stderr


with_axolotl = pytest.mark.skipif(BIN is None, reason="needs axolotl's own environment: make test-axolotl")


@with_axolotl
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_axolotls_own_command_gives_the_losses_and_weights_of_losia_trainer(tmp_path):
    material = make_material(tmp_path)
    said = run_axolotl(tmp_path, material, ["--launcher", "python"])
    losses = [float(found) for found in re.findall(r"'loss': '([\d.]+)'", said)]
    assert "losia/mean_learning_rate" in said and len(losses) == 6
    code = (ROOT / "tests" / "support" / "axolotl_expected.py").read_text()
    words = [f"{BIN}/python", "-c", code, str(tmp_path), json.dumps(SETTINGS)]
    told = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)
    assert told.returncode == 0, told.stderr[-3000:]
    assert losses == pytest.approx(json.loads(told.stdout.splitlines()[-1]), abs=1e-3)  # printed to four digits
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "own"))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in expected)
    AutoTokenizer.from_pretrained(tmp_path / "run"), AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@with_axolotl
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_axolotl_on_two_ranks_writes_one_plain_model(tmp_path):
    material = make_material(tmp_path)
    launcher = ["--launcher", "torchrun", "--", "--nproc_per_node=2"]
    said = run_axolotl(tmp_path, material, launcher, micro_batch_size=2)
    losses = [float(found) for found in re.findall(r"'loss': '([\d.]+)'", said)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    names = set(load_file(tmp_path / "run" / "model.safetensors"))
    assert names == set(load_file(material["model"] / "model.safetensors"))
