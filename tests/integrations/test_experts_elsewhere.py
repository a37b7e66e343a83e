"""Mixtures of experts where people train: the script, TRL, a loop over Accelerate, a model partitioned while it is made."""

import shutil
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.subnet.convert import find_sites
from tests.integrations.test_accelerate_loop import accelerator_for
from tests.integrations.test_trl import run as run_trl
from tests.launch.test_script_engines import losses, train
from tests.support import training
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.families import tiny_model
from tests.support.launching import arguments, make_material
from tests.support.quantized import quantize
from tests.support.trainers import examples, fresh_accelerate
from tests.support.training import Run
from tests.support.trl_models import save_tiny_model

IN_CODES = {"hidden_size": 32, "moe_intermediate_size": 24, "head_dim": 16}  # whole numbers of codes in fp32
CONFIG = {"rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "experts_per_slot": 2}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The script's material, with a mixture of experts in the place of its model."""
    material = make_material(tmp_path_factory.mktemp("material"))
    directory = tmp_path_factory.mktemp("mixture") / "model"
    shutil.copytree(material["model"], directory)
    vocabulary = AutoConfig.from_pretrained(directory).vocab_size
    tiny_model("qwen3_moe", vocab_size=vocabulary, max_position_embeddings=1024).save_pretrained(directory)
    return {**material, "model": directory}


@pytest.mark.parametrize("own", [{"sharding": "fsdp2"}, slow({"sharding": "fsdp2", "offload": True})], ids=str)
def test_the_script_trains_and_writes_what_one_process_does(ranks, mixture, tmp_path, own):
    alone, _ = train(arguments(mixture, tmp_path / "one", micro_batch=4))
    (found, kept), _ = ranks(2, train, arguments(mixture, tmp_path / "two", **own))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert found["held_out_loss_after"] == pytest.approx(alone["held_out_loss_after"], abs=1e-5)
    assert kept["sharded"] and kept["before"] == {"meta"}
    saved, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("two", "one"))
    for (name, weight), other in zip(saved.named_parameters(), wanted.parameters(), strict=True):
        assert (weight - other).abs().max() < 1e-5, name


def test_trls_trainer_trains_experts(tmp_path):
    directory = save_tiny_model(tmp_path / "model")
    model = tiny_model("qwen3_moe", vocab_size=97)
    model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id = 0, 1, None
    model.generation_config.pad_token_id, model.generation_config.eos_token_id, model.generation_config.bos_token_id = (
        0,
        1,
        None,
    )
    model.save_pretrained(directory)
    result = run_trl("sft", directory, str(tmp_path / "run"))
    assert result["losses"][-1] < result["losses"][0]
    before = {name: weight for name, weight in model.named_parameters() if "experts" in name}
    assert before and all(not torch.equal(result["weights"][name], weight) for name, weight in before.items())
    assert all("losia/experts_trained" in entry for entry in result["log"] if "loss" in entry)


def loop_over_accelerate(engine: str | None, form: str = "") -> dict[str, torch.Tensor]:
    """Whole weights of the experts after some steps, by Accelerate's wrappers or without, in codes of a form or plain."""
    run = Run(steps=6)
    with fresh_accelerate():
        torch.manual_seed(0)
        config = LoSiAConfig(rank_factor=0.25, period=2, selection=Drawn(), retired="fp32" if form else None)
        model = tiny_model("qwen3_moe", **(IN_CODES if form else {}))
        model = get_losia_model(quantize(model, form) if form else model, config).train()
        accelerator = accelerator_for(engine, None, "Qwen3MoeDecoderLayer", passes=1) if engine else None
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
        size = run.batch // (1 if accelerator is None else accelerator.num_processes)
        loader = DataLoader(examples(run), batch_size=size)
        if accelerator is not None:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losia = LoSiA(model, optimizer, config)
        for batch in loader:
            loss = model(**batch, use_cache=False).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            losia.step()
            optimizer.zero_grad()
        losia.consolidate()
        of_experts = [site for site in losia.sites if site.experts]
        assert all((site.packed is not None) == bool(form) for site in of_experts)
        assert losia.parameters.weight_is_resident != (engine in ("fsdp2", "zero3"))
        found = {site.name: losia.parameters.read_whole(site.weight).clone() for site in of_experts}
        losia.detach()
        if hasattr(model, "destroy"):
            model.destroy()
        return found


# Slow are engines that take quantized experts as DDP does, and forms beside which FSDP2's shows the same.
@pytest.mark.parametrize(
    "engine, form",
    [("torch", ""), ("torch", "nf4:experts"), ("fsdp2", "nf4:float32:experts")]
    + [slow(engine, "nf4:float32:double:experts") for engine in ("zero0", "zero1", "zero2", "zero3")]
    + [slow("zero3", "nf4:experts"), slow("fsdp2", "fp4:float32:double:experts")],
)
def test_a_loop_over_accelerate_trains_experts_as_one_process_does(ranks, engine, form):
    wanted = loop_over_accelerate(None, form)
    assert len(wanted) == 4
    for found in ranks(2, loop_over_accelerate, engine, form):
        assert max((found[name] - weight).abs().max().item() for name, weight in wanted.items()) < 1e-5


RUN = Run(steps=16, family="mixture:qwen3_moe", config=CONFIG)


def train_built_in_parts() -> dict:
    import deepspeed

    whole_of = training.build

    def build(run):
        whole = whole_of(run)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}):
            model = type(whole)(whole.config)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for name, parameter in model.named_parameters():
                parameter.data.copy_(whole.get_parameter(name).data)
        for name, buffer in whole.named_buffers():
            model.get_buffer(name).copy_(buffer)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        return model

    with mock.patch.object(training, "build", build):
        return training.train("zero3", RUN)


def test_experts_built_in_parts_are_converted_shard_by_shard(ranks):
    expected = training.reference(RUN)
    assert any(site.experts for site in find_sites(get_losia_model(training.build(RUN), LoSiAConfig(**CONFIG))))
    for result in ranks(2, train_built_in_parts):
        assert_same_run(result, expected)
