"""TRL's SFTTrainer and DPOTrainer with LoSiATrainerMixin, and the example scripts over them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from losia_dist import LoSiAConfig, LoSiATrainerMixin, get_losia_model
from losia_dist.errors import ConfigError, UnsupportedError
from tests.support.cases import only
from tests.support.trainers import FSDPOnCPU, close, fresh_accelerate, result_of
from tests.support.trl_models import conversations, preferences, save_tiny_model

CONFIG = LoSiAConfig(rank_factor=0.5, period=3)
EXAMPLES = Path(__file__).parents[2] / "examples"


class LoSiASFT(FSDPOnCPU, LoSiATrainerMixin, SFTTrainer):
    pass


class LoSiADPO(FSDPOnCPU, LoSiATrainerMixin, DPOTrainer):
    pass


KINDS = {"sft": (LoSiASFT, SFTConfig, conversations), "dpo": (LoSiADPO, DPOConfig, preferences)}


def settings(directory, **changes):
    return {
        "output_dir": directory,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 8,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **changes,
    }


def run(kind, model, directory, world=1, inspect=None, **changes):
    """Train a few steps on a global batch of four; the same keys as tests.support.trainers."""
    trainer_class, config_class, data = KINDS[kind]
    with fresh_accelerate():
        args = config_class(**settings(directory, per_device_train_batch_size=4 // world, **changes))
        trainer = trainer_class(
            model=model, args=args, train_dataset=Dataset.from_list(data(4) * 8), losia_config=CONFIG, processing_class=None
        )
        trainer.train()
        result = result_of(trainer)
        close(trainer)
        return result


ZERO3 = {"deepspeed": {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}}
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


@pytest.mark.parametrize("kind", only(["sft"], KINDS.keys()))
def test_the_loss_falls_only_subnets_change_and_ranks_agree_with_one_process(ranks, tmp_path, kind):
    model = save_tiny_model(tmp_path / "model")
    alone = run(kind, model, str(tmp_path))
    if kind == "dpo":  # the reference is the base model: at first both say the same
        assert math.isclose(alone["losses"][0], math.log(2), rel_tol=1e-6)
    assert alone["losses"][-1] < 0.9 * alone["losses"][0]
    base = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    for name, weight in base.items():
        changed = (alone["weights"][name] != weight).sum().item() / weight.numel()
        targeted = ".layers." in name and name.endswith("proj.weight")
        assert 0.2 < changed < 0.6 if targeted else changed == 0, (name, changed)  # a quarter, and re-localized quarters
    for engine, changes in [("DDP", {}), ("ZeRO-3", ZERO3), ("FSDP2", FSDP2)]:
        for result in ranks(2, run, kind, model, str(tmp_path), world=2, **changes):
            assert result["engine"]["world size"] == 2
            assert result["engine"]["sharded"] is (engine != "DDP")
            assert max(abs(a - b) for a, b in zip(result["losses"], alone["losses"], strict=True)) < 1e-4, engine
            for name, weight in alone["weights"].items():
                assert (result["weights"][name] - weight).abs().max() < 1e-3, (engine, name)


def test_a_reference_computed_beforehand_gives_the_same_run(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    loaded = run("dpo", model, str(tmp_path))["losses"]
    computed = run("dpo", model, str(tmp_path), precompute_ref_log_probs=True)["losses"]
    assert max(abs(a - b) for a, b in zip(loaded, computed, strict=True)) < 1e-5


def converted(path):
    return get_losia_model(AutoModelForCausalLM.from_pretrained(path), CONFIG)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"losia_config": LoSiAConfig(output_rank_factor=0.5)}, UnsupportedError, "output_rank_factor=0.5.*never train.*=None"),
        ({"ref_model": converted}, ConfigError, "ref_model has subnets: the reference is the base model"),
        ({"model": converted}, ConfigError, "no ref_model was passed.*Pass an unconverted model"),
        ({"sync_ref_model": True}, UnsupportedError, "sync_ref_model=True.*remove it"),
        ({"peft_config": "any"}, UnsupportedError, "PEFT adapter and LoSiA.*no peft_config"),
        ({"quantization_config": "any"}, UnsupportedError, "load the model with it yourself"),
    ],
)
def test_what_does_not_work_in_trl_is_refused_before_anything_is_loaded(tmp_path, arguments, error, words):
    path = save_tiny_model(tmp_path / "model")
    arguments = {name: value(path) if callable(value) else value for name, value in arguments.items()}
    fields = {name: arguments.pop(name) for name in ("sync_ref_model",) if name in arguments}
    with fresh_accelerate(), pytest.raises(error, match=words):
        LoSiADPO(
            **{"model": "absent", "args": DPOConfig(**settings(str(tmp_path), **fields)), "losia_config": CONFIG, **arguments}
        )


@pytest.mark.slow
@pytest.mark.parametrize("script, data", [("sft.py", conversations), ("dpo.py", preferences)])
def test_the_example_runs_and_writes_a_model_that_loads(tmp_path, script, data):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in data(8)))
    (tmp_path / "losia.yaml").write_text("rank_factor: 0.5\nperiod: 2\n")
    command = [sys.executable, str(EXAMPLES / script), "--model", model, "--data", str(tmp_path / "data.jsonl")]
    command += ["--losia_config", str(tmp_path / "losia.yaml"), "--output_dir", str(tmp_path / "out"), "--max_steps", "3"]
    command += ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--save_strategy", "no"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(trained.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
