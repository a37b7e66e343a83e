"""Shapes and budgets from measured importance."""

import pytest
import torch

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError
from losia_dist.tools.allocation import Captured, allocate, best_shapes, measure, shapes_of
from tests.reference.dense import select
from tests.support.models import tiny_llama
from tests.support.training import Run, calibration_batches


@pytest.fixture(scope="module")
def measured():
    config = LoSiAConfig(rank_factor=0.25)
    model = get_losia_model(tiny_llama(), config)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    return measure(losia, calibration_batches(Run(calibration=3)), [(1.0, 1 / 16), (0.25, 0.25), (0.5, 0.5), (0.01, 1.0)])


def test_what_is_measured_is_what_the_greedy_choice_holds(measured):
    dense = tiny_llama()
    name = "model.layers.1.mlp.up_proj"
    weight = dict(dense.named_parameters())[f"{name}.weight"]
    score = torch.zeros_like(weight)
    for batch in calibration_batches(Run(calibration=3)):
        dense.zero_grad()
        dense(**batch).loss.backward()
        wg = weight.detach() * weight.grad
        score += (wg - wg**2 / 2).abs()
    assert [one.factors for one in measured[name]] == [(1.0, 1 / 16), (0.25, 0.25), (0.5, 0.5)]  # the last leaves no row
    for one in measured[name]:
        rows, columns = int(one.factors[0] * score.shape[0]), int(one.factors[1] * score.shape[1])
        r, c = select(score, rows, columns)
        assert one.elements == rows * columns
        assert one.share == pytest.approx((score[r][:, c].sum() / score.sum()).item(), rel=1e-5)
        assert one.layer_importance == pytest.approx(score.sum().item(), rel=1e-5)


def test_a_layer_that_no_candidate_fits_is_refused():
    config = LoSiAConfig(rank_factor=0.25)
    model = get_losia_model(tiny_llama(), config)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    with pytest.raises(ConfigError, match="36 x 36 keeps no row or no column.*larger rank_factor"):
        measure(losia, calibration_batches(Run(calibration=1)), [(1.0, 0.01), (0.01, 1.0)])


def test_the_best_shape_is_the_one_that_captures_most(measured):
    best = best_shapes(measured)
    assert set(best.values()) == {(0.5, 0.5)}  # the only one of four times the size


def test_a_budget_goes_where_it_captures_most():
    def layer(importance, *shares):
        return [Captured((1.0, 0.1 * (k + 1)), 10 * (k + 1), share, importance) for k, share in enumerate(shares)]

    layers = {"weak": layer(1.0, 0.1, 0.2, 0.3), "strong": layer(5.0, 0.1, 0.2, 0.25), "flat": layer(9.0, 0.5, 0.5, 0.5)}
    assert allocate(layers, 30) == {"weak": (1.0, 0.1), "strong": (1.0, 0.1), "flat": (1.0, 0.1)}
    assert allocate(layers, 40)["strong"] == (1.0, 0.2)
    chosen = allocate(layers, 50)  # weak's next is worth 0.1, strong's 0.25
    assert chosen == {"weak": (1.0, 0.1), "strong": (1.0, 0.1 * 3), "flat": (1.0, 0.1)}
    with pytest.raises(ConfigError, match="29 values is less than the smallest candidates' 30"):
        allocate(layers, 29)


def test_shapes_of_equal_size():
    shapes = shapes_of(1 / 64)
    assert shapes[0] == (1.0, 1 / 64) and (1 / 8, 1 / 8) in shapes and shapes[-1] == (1 / 64, 1.0)
    assert all(rows * columns == pytest.approx(1 / 64) for rows, columns in shapes)


def test_a_pattern_from_it_is_a_configuration(measured):
    pattern = allocate(measured, 12_000)
    model = get_losia_model(tiny_llama(), LoSiAConfig(rank_factor=0.25, rank_pattern=pattern))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained <= 12_000
