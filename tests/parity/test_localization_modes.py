"""The other way to localize against the dense reference: every rank a group of its own."""

import pytest

from losia_dist import Located
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

BASE = Run(steps=10, accumulation=2, max_grad_norm=0.5)
RANK_PARALLEL = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "selection": Located(reduction="by_rank")}


@pytest.mark.parametrize("engine", ["ddp", "zero2", slow("zero3"), "fsdp2"])
def test_two_ranks_localize_two_groups_a_slot_from_their_own_data(ranks, engine):
    run = variant(BASE, config=RANK_PARALLEL)
    expected = reference(run, ranks=2)
    assert len(expected["history"]) == 2 * run.steps // 2
    for result in ranks(2, train, engine, run):
        assert_same_run(result, expected)


@pytest.mark.slow
def test_four_ranks_localize_all_four_groups_in_one_slot(ranks):
    run = variant(BASE, steps=8, accumulation=1, config=RANK_PARALLEL)
    for result in ranks(4, train, "fsdp2", run):
        assert_same_run(result, reference(run, ranks=4))


def test_more_ranks_than_groups_is_no_error(ranks):
    three_groups = {**RANK_PARALLEL, "output_rank_factor": None, "period": 4}
    run = variant(BASE, steps=8, accumulation=3, config=three_groups)
    for result in ranks(4, train, "ddp", run):
        assert_same_run(result, reference(run, ranks=4))


def test_one_process_localizes_as_it_always_does():
    run = variant(BASE, steps=8, config=RANK_PARALLEL)
    plain = variant(BASE, steps=8, config={**RANK_PARALLEL, "selection": "greedy"})
    assert_same_run(train("one", run), train("one", plain), tolerance=0.0)


def count_gradient_traffic(reduction: str) -> dict[str, int]:
    """Largest transfers of a step in which groups localize: of localization's own collectives, in elements."""
    from losia_dist.ranks import compat

    sent = {"reduce_scatter": 0}
    original = compat.reduce_scatter_flat

    def counted(received, whole, **options):
        sent["reduce_scatter"] += whole.numel()
        return original(received, whole, **options)

    compat.reduce_scatter_flat = counted
    try:
        train("ddp", Run(steps=2, config={"rank_factor": 0.25, "period": 2, "selection": Located(reduction=reduction)}))
    finally:
        compat.reduce_scatter_flat = original
    return sent


def test_no_gradient_is_communicated_where_every_rank_localizes_alone(ranks):
    assert [sent["reduce_scatter"] for sent in ranks(2, count_gradient_traffic, "by_rank")] == [0, 0]
    assert all(sent["reduce_scatter"] > 0 for sent in ranks(2, count_gradient_traffic, "all"))
