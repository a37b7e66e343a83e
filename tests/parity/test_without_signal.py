"""Gradients of exact zeros (no label, no advantage, a block that starts at zero), against the dense reference."""

import pytest
import torch

from losia_dist import Located
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

PERIOD = 3
CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": PERIOD}
# The first batch, one in the middle of a slot, and the whole of a later one.
STEPS = (0, 4, 9, 10, 11)
RUN = Run(
    steps=15,
    max_grad_norm=0.5,
    config=CONFIG,
    quiet=tuple((step, 0) for step in STEPS),
    silenced="model.layers.1.self_attn.o_proj.weight",
)


@pytest.mark.parametrize("engine", ["one", "ddp", slow("zero1"), "zero2", slow("zero3"), "fsdp2"])
def test_steps_without_signal_equal_the_reference(ranks, engine):
    expected = reference(RUN)
    for result in [train(engine, RUN)] if engine == "one" else ranks(2, train, engine, RUN):
        assert_same_run(result, expected)


def test_a_slot_without_signal_leaves_subnets_where_they_are():
    history = {step: chosen for step, _, chosen in reference(RUN)["history"]}
    first = reference(RUN)["first"]
    for name, (rows, columns) in history[11].items():  # the slot of steps 9 to 11, of the last group
        assert torch.equal(rows, first[name][0]) and torch.equal(columns, first[name][1]), name
    assert any(not torch.equal(rows, first[name][0]) for name, (rows, _) in history[2].items())


def test_a_step_with_one_micro_batch_without_signal_counts_as_any_other(ranks):
    quiet = ((0, 0), (1, 1), (4, 0), (5, 1))
    run = variant(RUN, accumulation=2, quiet=quiet, config={**CONFIG, "layers_per_slot": 2}, silenced=None)
    expected = reference(run)
    assert_same_run(train("one", run), expected)
    for result in ranks(2, train, "ddp", run):
        assert_same_run(result, expected)


@pytest.mark.parametrize("engine", ["one", "ddp"])
def test_each_rank_with_layers_of_its_own_too(ranks, engine):
    run = variant(RUN, config={**CONFIG, "selection": Located(reduction="by_rank")})
    world = 1 if engine == "one" else 2
    expected = reference(run, world)
    for result in [train(engine, run)] if engine == "one" else ranks(2, train, engine, run):
        assert_same_run(result, expected)


def test_a_layer_that_calibration_shows_nothing_of_keeps_its_subnet():
    silent = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    run = variant(RUN, quiet=(), calibration=2, config={**CONFIG, "selection": Located(start="importance")})
    result, expected, drawn = train("one", run), reference(run), reference(variant(run, config=CONFIG, calibration=0))
    assert_same_run(result, expected)
    for name in silent:
        assert torch.equal(result["first"][name][0], drawn["first"][name][0]), name
