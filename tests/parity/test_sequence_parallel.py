"""Ranks that share each sequence (DeepSpeed's Ulysses) against one process: losses, weights, places and clip factors."""

import pytest
import torch

from losia_dist import Located
from tests.support.cases import grid, slow
from tests.support.compare import assert_same_run
from tests.support.sequences import Run, reference, train

STAGES = [0, 1, 2, 3]
CLIPPED = Run(accumulation=2, max_grad_norm=0.2)
RANKS = {"2": (2, 2), "4": (4, 2), "4 together": (4, 4)}  # ranks, and those that share a sequence


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(run: Run, owners: int = 1):
        key = (repr(run), owners)
        if key not in kept:
            kept[key] = reference(run, owners)
        return kept[key]

    return of


def assert_same(results, wanted, *, has_norms=True):
    for result in results:
        assert_same_run(result, wanted)
        if has_norms:
            torch.testing.assert_close(torch.tensor(result["norms"]), torch.tensor(wanted["norms"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ranks_of, stage", grid(RANKS, {str(stage): stage for stage in STAGES}, often=["2-3"]))
def test_masked_prompts_accumulated_and_clipped_equal_one_process(ranks, expected, ranks_of, stage):
    wanted = expected(CLIPPED)
    assert min(wanted["norms"]) > CLIPPED.max_grad_norm  # clipping acts in every step
    world, size = ranks_of
    assert_same(ranks(world, train, CLIPPED, stage, size), wanted, has_norms=stage > 0)


LOCATED = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 5}
BY_RANK = {**LOCATED, "selection": Located(reduction="by_rank")}
FROM_BATCHES = {**LOCATED, "selection": Located(start="importance")}
FORMS = {
    "packed": (Run(steps=10, packed=True, checkpointing=True), 3),
    "keys' heads repeated": (Run(steps=10, model={"num_key_value_heads": 1}), 2),
    "all gradients reduced whole": (
        Run(steps=10, max_grad_norm=0.2, deepspeed={"zero_optimization": {"reduce_scatter": False}}),
        3,
    ),
    "tied": (Run(steps=10, model={"tie_word_embeddings": True}), 1),
}


@pytest.mark.parametrize("form", [slow(name) if name in ("all gradients reduced whole", "tied") else name for name in FORMS])
def test_other_forms_equal_it_too(ranks, expected, form):
    run, stage = FORMS[form]
    assert_same(ranks(2, train, run, stage, 2), expected(run), has_norms=form != "packed")


@pytest.mark.slow
@pytest.mark.parametrize("world, stage", [(2, 3), (4, 2)])
def test_each_group_of_ranks_localizes_by_itself(ranks, expected, world, stage):
    run = Run(config=BY_RANK)
    assert_same(ranks(world, train, run, stage, 2), expected(run, owners=world // 2))


@pytest.mark.parametrize("world, stage", [(2, 3), slow(4, 2)])
def test_first_subnets_are_located_from_whole_sequences(ranks, expected, world, stage):
    run = Run(steps=5, calibration=2, config=FROM_BATCHES)
    wanted = expected(run)
    for result in ranks(world, train, run, stage, 2):
        for weight, (rows, columns) in wanted["first"].items():
            assert torch.equal(result["first"][weight][0], rows) and torch.equal(result["first"][weight][1], columns), weight
        assert_same_run(result, wanted)
