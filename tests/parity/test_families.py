"""Every model family against the dense reference in fp32: whole weights, losses and indices over two re-localization cycles."""

import pytest

from losia_dist import LoSiAConfig
from losia_dist.formulas import cycle_steps
from tests.support.cases import grid
from tests.support.compare import assert_same_run
from tests.support.families import EXPERT_FAMILIES, FAMILIES
from tests.support.training import Run, reference, train

CONFIG = {"rank_factor": (0.3, 0.2), "output_rank_factor": 0.25, "period": 3}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [Run(steps=18, family=family, config=CONFIG) for family in FAMILIES if family != "llama"]
EXPERTS = [Run(steps=18, family=family, config={**CONFIG, "target_modules": ATTENTION}) for family in EXPERT_FAMILIES]


def by_family(runs):
    return [pytest.param(run, id=run.family) for run in runs]


def test_the_runs_span_two_cycles():
    config = LoSiAConfig(**CONFIG)
    assert all(run.steps >= 2 * cycle_steps(3, config.period, config.layers_per_slot) for run in DENSE + EXPERTS)


@pytest.mark.parametrize("run", by_family(DENSE + EXPERTS))
def test_a_family_trains_as_the_dense_reference_does(run):
    assert_same_run(train("one", run), reference(run))


SHARDED = {r.family: r for r in DENSE + EXPERTS if r.family == "gpt2" or (r in EXPERTS and "3" in r.family)}
OFTEN = ["gpt2-ddp", "gpt2-zero3", "gpt2-fsdp2", "qwen3_moe-ddp", "qwen3_moe-fsdp2"]


@pytest.mark.parametrize("run, engine", grid(SHARDED, ["ddp", "zero3", "fsdp2"], often=OFTEN))
def test_transposed_weights_and_fused_experts_stay_the_same_when_sharded(ranks, engine, run):
    expected = reference(run)
    for result in ranks(2, train, engine, run):
        assert_same_run(result, expected)
