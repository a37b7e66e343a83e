"""Runs of a mixture of experts resume and move between engines: subnets of experts are state like any other."""

from dataclasses import replace

import pytest

from tests.support import resume as runs
from tests.support.cases import grid

# Five experts divide among no ranks; parts of two localize apart, and a save falls into the slot of one.
CONFIG = {"rank_factor": 0.25, "period": 3, "experts_per_slot": 2, "train_norms": True}
RUN = replace(runs.RUN, family="qwen3_moe", model={"num_experts": 5}, steps=16, batch=12, config=CONFIG)
STEP = 7  # inside a slot
ENGINES = {"one": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}


@pytest.mark.parametrize("engine, dtype", grid(list(ENGINES), ["fp32", "bf16"], often=["one-fp32"]))
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(ranks, tmp_path, engine, dtype):
    run, world = replace(RUN, dtype=dtype), ENGINES[engine]
    undisturbed = ranks(world, runs.train_and_save, engine, run, tmp_path, (STEP, 12))
    for step in (STEP, 12):
        resumed = ranks(world, runs.resume, engine, run, tmp_path, step)
        for ours, theirs in zip(resumed, undisturbed, strict=True):
            assert ours["first"] == step and ours["extra"] == {"done": step}
            runs.assert_equal(ours, theirs)


@pytest.mark.parametrize(
    "source, target",
    grid(["one", "ddp", "zero3", "fsdp2"], ["one", "zero2", "zero3", "fsdp2"], often=["fsdp2-one"]),
)
def test_a_run_goes_on_on_another_engine(ranks, tmp_path, source, target):
    undisturbed = ranks(ENGINES[source], runs.train_and_save, source, RUN, tmp_path, (STEP,))[0]
    for result in ranks(ENGINES[target], runs.resume, target, RUN, tmp_path, None):
        assert result["first"] == STEP
        runs.assert_equal(result, undisturbed, tolerance=1e-5)
