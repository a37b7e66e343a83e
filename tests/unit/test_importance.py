"""Importance by hand, and its accumulation over micro-batches."""

import pytest
import torch
import torch.distributed as dist

from losia_dist.localization.accumulator import ImportanceAccumulator
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.importance import importance_, update_averages_


def test_importance_of_one_element_by_hand():
    weight = torch.tensor([2.0, -1.0])
    assert importance_(torch.tensor([0.5, 0.5]), weight, "param_mix").tolist() == [0.5, 0.625]  # |1 - 1/2|, |-1/2 - 1/8|
    assert importance_(torch.tensor([0.5, 0.5]), weight, "first_order").tolist() == [1.0, 0.5]
    assert importance_(torch.tensor([0.5, 0.5]), weight, "second_order").tolist() == [1.0, 0.25]


def test_the_deviation_uses_the_mean_just_updated():
    mean, deviation = torch.tensor([1.0]), torch.tensor([2.0])
    update_averages_(mean, deviation, torch.tensor([3.0]), (0.5, 0.75))
    assert mean.item() == 2.0  # (1 + 3) / 2
    assert deviation.item() == 1.75  # 0.75 * 2 + 0.25 * |3 - 2|


def accumulator(group=None) -> ImportanceAccumulator:
    return ImportanceAccumulator(
        (2, 2),
        device=torch.device("cpu"),
        collectives=RowCollectives(group),
        importance="param_mix",
        betas=(0.85, 0.85),
        weight_is_resident=True,
    )


def test_micro_batches_are_summed_before_the_importance_is_taken():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    parts = [torch.rand(2, 2) for _ in range(3)]
    apart, whole = accumulator(), accumulator()
    for part in parts:
        apart(part.clone(), weight)
    whole(sum(parts), weight)
    apart.end_step()
    whole.end_step()
    torch.testing.assert_close(apart.score(), whole.score())


def test_a_discarded_step_leaves_no_trace():
    weight = torch.ones(2, 2)
    used, clean = accumulator(), accumulator()
    used(torch.full((2, 2), float("nan")), weight)
    used.discard_step()
    for one in (used, clean):
        one(torch.full((2, 2), 0.25), weight)
        one.end_step()
    assert torch.equal(used.score(), clean.score())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_score_is_the_product_of_both_averages(steps):
    one = accumulator()
    mean = deviation = 0.0
    for step in range(steps):
        gradient = 0.1 * (step + 1)
        one(torch.full((2, 2), gradient), torch.full((2, 2), 2.0))
        one.end_step()
        product = 2.0 * gradient
        value = abs(product - product**2 / 2)
        mean = 0.85 * mean + 0.15 * value
        deviation = 0.85 * deviation + 0.15 * abs(value - mean)
    torch.testing.assert_close(one.score(), torch.full((2, 2), mean * deviation))


def accumulate(*gradients: list[list[float]]) -> list[list[float]]:
    """This rank's rows of the score after a step for each gradient, which all ranks have alike."""
    one = accumulator(dist.group.WORLD if dist.is_initialized() else None)
    for gradient in gradients:
        one(torch.tensor(gradient), torch.ones(2, 2))
        one.end_step()
    return one.score().tolist()


def test_a_rank_whose_rows_are_zero_goes_by_the_layers_other_rows(ranks):
    """One row a rank: a zero row is no sign that the batch said nothing of the layer."""
    everywhere, second_row, nothing = [[0.5, 0.25], [0.25, 0.5]], [[0.0, 0.0], [0.25, 0.5]], [[0.0, 0.0], [0.0, 0.0]]
    steps = (everywhere, second_row, nothing)
    whole = accumulate(*steps)
    assert whole == accumulate(everywhere, second_row) != accumulate(everywhere)
    assert [rows[0] for rows in ranks(2, accumulate, *steps)] == whole
