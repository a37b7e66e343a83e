"""What else a resumed run depends on: random numbers, other optimizers, layers and localizations; and plain values."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from losia_dist import (
    Located,
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    export_model,
    get_losia_model,
    load_checkpoint,
    losia_parameter_groups,
    save_checkpoint,
)
from losia_dist.checkpoint import values
from losia_dist.errors import CheckpointError, ConfigError
from tests.support import resume as runs
from tests.support.models import tiny_llama

STEPS, SAVED = 9, 5
TOKENS = torch.randint(0, 96, (STEPS, 2, 12), generator=torch.Generator().manual_seed(3))


def gpt2() -> torch.nn.Module:
    """Its linear layers store their weights the other way round, and its output layer shares the embedding's."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=97, n_positions=32, n_embd=36, n_layer=3, n_head=3, initializer_range=0.1)
    return GPT2LMHeadModel(shape)


def build(model: torch.nn.Module, seed: int, optimizer: Callable = LoSiAAdamW, dtype=None, **settings):
    """(what save_checkpoint is given, a function that trains one step)."""
    config = LoSiAConfig(**{"rank_factor": 0.25, "period": 2, **settings}, seed=seed)
    get_losia_model(model.train(), config, subnet_dtype=dtype)
    optimizer = optimizer(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    cycles = {"momentum", "betas"} & optimizer.defaults.keys()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20, cycle_momentum=bool(cycles))

    def step() -> float:
        tokens = TOKENS[losia.steps] + random.randrange(2) * int(np.random.randint(2))
        loss = model(input_ids=tokens.clamp(max=96), labels=tokens.clamp(max=96), use_cache=False).loss
        loss.backward()
        optimizer.step()
        losia.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    return {"model": model, "optimizer": optimizer, "losia": losia, "scheduler": scheduler}, step


def bf16_llama() -> torch.nn.Module:
    return tiny_llama().to(torch.bfloat16)


VARIANTS = {
    "dropout and the host's random numbers": (lambda: tiny_llama(attention_dropout=0.3), {}),
    "torch's AdamW, state made at its first step": (tiny_llama, {"optimizer": torch.optim.AdamW}),
    "torch's fused AdamW in bf16": (bf16_llama, {"optimizer": partial(torch.optim.AdamW, fused=True)}),
    "NAdam, whose step counts are products too": (tiny_llama, {"optimizer": torch.optim.NAdam}),
    "Adafactor, with less than a number per weight": (tiny_llama, {"optimizer": torch.optim.Adafactor}),
    "SGD with momentum": (tiny_llama, {"optimizer": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)}),
    "GPT-2, tied": (gpt2, {"output_rank_factor": 0.25}),
    "fp32 subnets in bf16 weights": (bf16_llama, {"dtype": torch.float32}),
    "tied Llama, embedding trained": (lambda: tiny_llama(tie_word_embeddings=True), {"train_embeddings": True}),
    "two layers a slot": (tiny_llama, {"layers_per_slot": 2}),
    "all rows": (tiny_llama, {"rank_factor": (1.0, 0.25)}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resumes_bit_for_bit_and_exports_what_it_computes_with(tmp_path, name):
    make, settings = VARIANTS[name]
    random.seed(1)
    np.random.seed(1)
    run, step = build(make(), 0, **settings)
    losses = []
    for done in range(STEPS):
        if done in (1, SAVED):  # the first one writes the base
            save_checkpoint(tmp_path / "run", **run)
        losses.append(step())
    other_model = make()
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.add_(0.1)
    other, other_step = build(other_model, 1, **settings)
    random.random(), np.random.rand(), torch.rand(3)
    load_checkpoint(tmp_path / "run", **other)
    assert other["optimizer"].param_groups[0]["lr"] != 1e-3
    assert [other_step() for _ in range(SAVED, STEPS)] == losses[SAVED:]
    ours, theirs = runs.everything(other["losia"]), runs.everything(run["losia"])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert run["scheduler"].state_dict() == other["scheduler"].state_dict()

    save_checkpoint(tmp_path / "run", **other)
    exported = load_file(export_model(tmp_path / "run", tmp_path / "model") / "model.safetensors")
    live = load_file(export_model(run["losia"], tmp_path / "live") / "model.safetensors")
    assert exported.keys() == live.keys() and all(torch.equal(exported[name], tensor) for name, tensor in live.items())


RANK_PARALLEL = replace(runs.RUN, batch=12, config={**runs.RUN.config, "selection": Located(reduction="by_rank")})


def save_twice(directory):
    return runs.train_and_save("ddp", RANK_PARALLEL, directory, (5, 7))


def load_on_other_ranks(directory):
    losia, _, close = runs.start("ddp", RANK_PARALLEL)
    load_checkpoint(directory, **runs.parts(losia), step=5)  # between two slots
    assert losia.steps == 5
    try:
        load_checkpoint(directory, **runs.parts(losia), step=7)
    finally:
        close()


@pytest.mark.slow
def test_rank_parallel_localization_resumes_on_its_ranks_and_on_others_between_slots(ranks, tmp_path):
    undisturbed = ranks(2, save_twice, tmp_path)
    for ours, theirs in zip(ranks(2, runs.resume, "ddp", RANK_PARALLEL, tmp_path, 7), undisturbed, strict=True):
        runs.assert_equal(ours, theirs)
    for kind, message in ranks.errors(3, load_on_other_ranks, tmp_path):
        assert kind == "CheckpointError" and "Resume on 2 ranks, or from a checkpoint whose step is a multiple" in message


def test_plain_values_come_back_as_they_were():
    value = {
        "list": [1, 2.5, None, True, "text", float("inf")],
        "tuple": (1, (2, [3])),
        3: {"numbers": {1: 2}},
        "$tuple": "a name that is also a mark",
        "tensor": torch.arange(4).to(torch.bfloat16),
        "array": np.arange(3, dtype=np.uint32),
        "scalar": np.float32(0.5),
    }
    tensors: dict[str, torch.Tensor] = {}
    back = values.decode(values.encode(value, tensors, "value", "extra"), tensors)
    assert torch.equal(back.pop("tensor"), value.pop("tensor"))
    array = back.pop("array")
    assert array.dtype == np.uint32 and (array == value.pop("array")).all()
    assert back == value
    with pytest.raises(CheckpointError, match=r"extra\['a'\]\[1\] is a builtins\.set"):
        values.encode({"a": [1, {2}]}, {}, "value", "extra")


def test_what_does_not_belong_to_the_run_is_refused(tmp_path):
    run, _ = build(tiny_llama(), 0)
    for arguments, text in (
        ({"model": tiny_llama()}, "model is not the one"),
        ({"losia": None}, "pass the conductor"),
        ({"optimizer": torch.optim.SGD(run["model"].parameters())}, "optimizer is not the one"),
        ({"step": -1}, "step=-1"),
    ):
        with pytest.raises(ConfigError, match=text):
            save_checkpoint(tmp_path, **{**run, **arguments})
