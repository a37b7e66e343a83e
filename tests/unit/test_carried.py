"""Moments that go along with a subnet: whose they are, and how large the first updates of new weights are."""

import pytest
import torch

from losia_dist import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.optim.adamw import adamw_
from losia_dist.optim.carried import carry_state

OLD = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 7])
NEW = torch.tensor([4, 5, 6]), torch.tensor([2, 5, 7, 9])
STAY = (torch.tensor([1, 2]), torch.tensor([1, 3])), (torch.tensor([0, 2]), torch.tensor([0, 2]))  # places in old, in new


def state(squares: torch.Tensor) -> dict[str, torch.Tensor]:
    value = torch.randn_like(squares)
    return {"value": value, "exp_avg": torch.randn_like(squares), "exp_avg_sq": squares, "step": torch.tensor(30.0)}


def test_moments_of_weights_that_stay_go_along_and_the_rest_begins():
    before, values = state(torch.rand(3, 4)), torch.randn(3, 4)
    after = carry_state(before, OLD, NEW, values)
    (old_rows, old_columns), (new_rows, new_columns) = STAY
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][new_rows][:, new_columns], before[name][old_rows][:, old_columns])
    new = torch.ones(3, 4, dtype=torch.bool)
    new[new_rows[:, None], new_columns] = False
    assert after["exp_avg"][new].abs().sum() == 0 and (after["exp_avg_sq"][new] > 0).all()
    assert torch.equal(after["value"], values) and after["step"] == 30


def test_a_subnet_that_stays_where_it_is_keeps_every_moment():
    before = state(torch.rand(3, 4))
    after = carry_state(before, OLD, OLD, before["value"])
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_mean_squares_of_equal_structure_are_found_again():
    """Where the mean square is a product of one number per row and one per column, its estimate is exact for rows that stay."""
    rows, columns = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 2.0, 3.0, 2.0])
    after = carry_state(state(rows[:, None] * columns), OLD, NEW, torch.zeros(3, 4))["exp_avg_sq"]
    assert torch.allclose(after[0], rows[1] * torch.tensor([2.0, columns.mean(), 2.0, columns.mean()]))  # row 4
    assert torch.allclose(after[1], rows.mean() * torch.tensor([2.0, columns.mean(), 2.0, columns.mean()]))  # row 5, new


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_moments_that_are_nothing_or_almost_stay_finite(size):
    after = carry_state(state(torch.full((3, 4), size)), OLD, NEW, torch.zeros(3, 4))["exp_avg_sq"]
    assert torch.isfinite(after).all() and torch.allclose(after, torch.full((3, 4), size), rtol=1e-5)


def test_first_updates_of_new_weights_are_no_larger_than_the_learning_rate():
    """With moments of 0 under a step count that goes on the first would be about 3.2 times too large (algorithm.md)."""
    squares = torch.full((3, 4), 0.01 * (1 - 0.999**30))  # of gradients of 0.1
    after = carry_state({**state(squares), "exp_avg": torch.full((3, 4), 0.1)}, OLD, NEW, torch.zeros(3, 4))
    values, before = after["value"], after["value"].clone()
    adamw_(
        [values],
        [torch.full((3, 4), 0.1)],
        [after["exp_avg"]],
        [after["exp_avg_sq"]],
        steps=[31.0],
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
    )
    assert 0 < (values - before).abs().max() <= 1.05e-3


def test_only_the_two_choices_exist():
    with pytest.raises(ConfigError, match="moments='halved' is not available in this version; available: 'cleared', 'kept'"):
        LoSiAConfig(moments="halved")


def test_an_optimizer_without_a_number_per_weight_is_refused_by_name():
    factored = {"value": torch.zeros(3, 4), "exp_avg_sq_row": torch.zeros(3)}
    with pytest.raises(ConfigError, match=r"its 'exp_avg_sq_row' is \[3\] for a subnet of \[3, 4\]. Use LoSiAAdamW"):
        carry_state(factored, OLD, NEW, torch.zeros(3, 4))
