"""Codes that FSDP2 would cast, or that were left out of it: refused on every rank before anything trains."""

from __future__ import annotations

import re

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from tests.support.families import decoder_layers
from tests.support.training import Run, build, train

CONFIG = {"rank_factor": 0.25, "period": 2, "selection": "random"}
MIXTURE = "mixture:qwen3_moe"


def cast(family: str, form: str) -> None:
    train("fsdp2", Run(steps=2, config=CONFIG, family=family, quantized=form, dtype="mixed"))


def left_out(family: str, form: str) -> None:
    config = LoSiAConfig(rank_factor=0.25, period=2, selection=Drawn())
    model = get_losia_model(build(Run(family=family, quantized=form)), config)
    codes = {parameter for parameter in model.parameters() if parameter.dtype == torch.uint8}
    for layer in decoder_layers(model):
        fully_shard(layer, ignored_params=codes)
    fully_shard(model, ignored_params=codes)
    LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)


@pytest.mark.parametrize(
    "function, family, message",
    [
        (cast, MIXTURE, "nf4 weight stored as torch.uint8 was cast to torch.bfloat16.*bnb_4bit_quant_storage=torch.bfloat16"),
        (left_out, MIXTURE, "is quantized and not sharded, while other layers are.*bnb_4bit_quant_storage=torch.bfloat16"),
        (left_out, "llama", "layers.0.self_attn.q_proj is quantized and not sharded.*bnb_4bit_quant_storage=torch.bfloat16"),
    ],
)
def test_codes_that_fsdp2_would_not_keep_are_refused_alike(ranks, function, family, message):
    found = ranks.errors(2, function, family, "nf4:experts" if family == MIXTURE else "nf4")
    assert {name for name, _ in found} == {"UnsupportedError"}
    assert len({text for _, text in found}) == 1
    assert re.search(message, found[0][1])


@pytest.mark.slow
def test_codes_of_experts_in_the_dtype_that_fsdp2_computes_in_train(ranks):
    run = Run(steps=4, config=CONFIG, family=MIXTURE, quantized="nf4:bfloat16:experts", dtype="mixed")
    losses = [result["losses"] for result in ranks(2, train, "fsdp2", run)]
    plain = train("one", Run(steps=4, config=CONFIG, family=MIXTURE, quantized="nf4:bfloat16:experts"))["losses"]
    assert losses[0] == losses[1] == pytest.approx(plain, rel=0.02)
