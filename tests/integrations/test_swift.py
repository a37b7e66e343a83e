"""configs/swift/plugin.py over stand-ins for two classes of ms-swift, which pins other releases of TRL and PEFT."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from losia_dist import LoSiAConfig, LoSiATrainer
from losia_dist.errors import ConfigError
from tests.support.launching import ROOT
from tests.support.models import tiny_llama
from tests.support.trainers import fresh_accelerate

SETTINGS = {"rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "rewarm_steps": 1}


class SwiftTrainer(Seq2SeqTrainer):
    """Takes a template beside what Transformers' takes, as ms-swift's does."""

    def __init__(self, *args, template, **kwargs):
        super().__init__(*args, **kwargs)


class TrainerFactory:
    TRAINER_MAPPING = {"causal_lm": "swift.trainers.Seq2SeqTrainer", "grpo": "swift.rlhf_trainers.GRPOTrainer"}


@pytest.fixture
def swift_trainer(monkeypatch):
    """The class that ms-swift would make its trainer of, found as it finds it."""
    trainers = ModuleType("swift.trainers")
    trainers.Seq2SeqTrainer, trainers.TrainerFactory = SwiftTrainer, TrainerFactory
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.trainers", trainers)
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
    spec = importlib.util.spec_from_file_location("_external", ROOT / "configs" / "swift" / "plugin.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_external", module)
    spec.loader.exec_module(module)
    assert TrainerFactory.TRAINER_MAPPING["grpo"] == "swift.rlhf_trainers.GRPOTrainer"
    path, _, name = TrainerFactory.TRAINER_MAPPING["causal_lm"].rpartition(".")
    return getattr(importlib.import_module(path), name)


def trained(cls, directory, **more):
    arguments = Seq2SeqTrainingArguments(
        str(directory), max_steps=4, report_to="none", save_strategy="no", logging_steps=1, seed=0
    )
    rows = torch.arange(3, 67).reshape(8, 8).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    with fresh_accelerate():
        trainer = cls(model=tiny_llama(), args=arguments, train_dataset=data, **more)
        trainer.train()
        trainer.save_model(directory / "model")
        trainer.losia.detach()
    return load_file(directory / "model" / "model.safetensors")


def test_swifts_trainer_trains_as_losia_trainer_and_saves_a_plain_model(swift_trainer, tmp_path, monkeypatch):
    (tmp_path / "losia.yaml").write_text("".join(f"{name}: {value}\n" for name, value in SETTINGS.items()))
    monkeypatch.setenv("LOSIA_CONFIG", str(tmp_path / "losia.yaml"))
    saved = trained(swift_trainer, tmp_path / "swift", template=object())
    expected = trained(LoSiATrainer, tmp_path / "own", losia_config=LoSiAConfig.from_dict(SETTINGS))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in expected)


def test_settings_that_are_not_there_are_refused(swift_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("LOSIA_CONFIG", "tiny")
    with pytest.raises(ConfigError, match="tiny"):
        trained(swift_trainer, tmp_path, template=object())
