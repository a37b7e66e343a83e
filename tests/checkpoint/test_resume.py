"""A resumed run is the run: bit for bit on the same engine and ranks, to rounding on others."""

from dataclasses import replace

import pytest

from tests.support import resume as runs
from tests.support.cases import grid

ENGINES = {"one": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}
# Steps end slots at 5, 10 and 15, and each re-localized group rewarms over the 5 steps after that.
INSIDE_A_SLOT_IN_REWARMING, LAST_OF_A_SLOT = 7, 10
SAVES = (INSIDE_A_SLOT_IN_REWARMING, LAST_OF_A_SLOT)
OFTEN = ["one-fp32", "one-bf16", "fsdp2-fp32"]  # ZeRO-3: test_deepspeed.py


@pytest.mark.parametrize("engine, dtype", grid(list(ENGINES), ["fp32", "bf16"], often=OFTEN))
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(ranks, tmp_path, engine, dtype):
    run, world = replace(runs.RUN, dtype=dtype), ENGINES[engine]
    undisturbed = ranks(world, runs.train_and_save, engine, run, tmp_path, SAVES)
    for step in SAVES:
        resumed = ranks(world, runs.resume, engine, run, tmp_path, step)
        for ours, theirs in zip(resumed, undisturbed, strict=True):
            assert ours["first"] == step and ours["extra"] == {"done": step}
            runs.assert_equal(ours, theirs)
