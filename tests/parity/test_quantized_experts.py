"""Mixtures whose fused experts are quantized: every engine equals the dense reference over the values of the codes."""

from __future__ import annotations

import pytest
import torch

from losia_dist import Drawn, Located, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from tests.support.cases import grid, slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, build, reference, train, variant

# What subnets leave is kept in fp32, for the reason given in tests/parity/test_quantized.py.
CONFIG = {"rank_factor": (0.3, 0.2), "output_rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "retired": "fp32"}
NF4 = "nf4:double:experts"
LOCATED = Run(steps=12, accumulation=2, max_grad_norm=0.5, config=CONFIG, family="mixture:qwen3_moe", quantized=NF4)
MODES = {
    "located": LOCATED,
    "drawn": variant(LOCATED, config={**CONFIG, "selection": "random", "seed": 5}),
    "parts": variant(LOCATED, steps=24, config={**CONFIG, "experts_per_slot": 2}),
    "transposed": variant(LOCATED, family="mixture:gpt_oss"),
    "transposed parts": variant(LOCATED, steps=24, family="mixture:gpt_oss", config={**CONFIG, "experts_per_slot": 2}),
    "all rows": variant(LOCATED, config={**CONFIG, "rank_factor": (1, 0.2)}),
    "all columns": variant(LOCATED, config={**CONFIG, "rank_factor": (0.3, 1), "selection": "random"}),
    "fp4": variant(LOCATED, quantized="fp4:experts"),
    "fp8": variant(LOCATED, quantized="fp8:experts"),
    "bf16 storage": variant(LOCATED, quantized="nf4:bfloat16:experts"),
    "warm start": variant(LOCATED, calibration=6, config={**CONFIG, "selection": Located(start="importance")}),
    "without outliers": variant(LOCATED, calibration=6, config={**CONFIG, "selection": Drawn(outlier_limit=2.0)}),
}
OFTEN = ("located", "transposed parts")
ENGINES = ["ddp", "zero2", "zero3", "fsdp2"]


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of_run(run: Run):
        run = variant(run, checkpointing="off", quantized=run.quantized.replace(":bfloat16", ""))
        if repr(run) not in kept:
            kept[repr(run)] = reference(run)
        return kept[repr(run)]

    return of_run


@pytest.mark.parametrize("mode", grid(MODES, often=OFTEN))
def test_one_process_equals_it(expected, mode):
    assert_same_run(train("one", mode), expected(mode))


@pytest.mark.parametrize(
    "engine, mode",
    [
        ("fsdp2", MODES["located"]),
        slow("zero3", MODES["transposed parts"]),
        slow("fsdp2", MODES["transposed parts"]),
        slow("zero3", MODES["drawn"]),
        slow("ddp", MODES["located"]),
        slow("zero2", MODES["parts"]),
        slow("fsdp2", MODES["fp8"]),
        slow("zero3", MODES["fp8"]),
        slow("fsdp2", MODES["bf16 storage"]),
        slow("zero3", MODES["bf16 storage"]),
        slow("fsdp2-noreshard", MODES["drawn"]),
        slow("hsdp", MODES["located"]),
        slow("hsdp", MODES["transposed parts"]),
        slow("hsdp", MODES["fp8"]),
        slow("zero0", MODES["located"]),
        slow("zero0", MODES["transposed parts"]),
        slow("zero1", MODES["parts"]),
        slow("zero1", MODES["fp8"]),
    ],
)
def test_every_engine_equals_it(ranks, expected, engine, mode):
    for result in ranks(4 if engine == "hsdp" else 2, train, engine, mode):
        assert_same_run(result, expected(mode))


@pytest.mark.parametrize("engine", [slow("one"), slow("fsdp2"), slow("zero3")])
def test_so_does_checkpointing(ranks, expected, engine):
    run = variant(LOCATED, checkpointing="non-reentrant")
    for result in [train("one", run)] if engine == "one" else ranks(2, train, engine, run):
        assert_same_run(result, expected(run))


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "experts_per_slot": 2}])
def test_so_does_a_model_whose_layers_are_compiled(expected, config):
    run = variant(LOCATED, steps=8, config=config)

    def compile_layers(stage, losia, engine):
        if stage == "before" and losia.steps == 0:
            for layer in losia.model.model.layers:
                layer.compile(backend="aot_eager")

    assert_same_run(train("one", run, compile_layers), expected(run))


@pytest.mark.slow
def test_compiled_layers_compute_with_experts_that_hold_no_subnet():
    config = LoSiAConfig(rank_factor=0.25, target_modules=["q_proj"], selection=Drawn())
    model = get_losia_model(build(LOCATED), config)
    LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    tokens = torch.arange(3, 35).reshape(2, 16)
    before = model(tokens).logits
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)
