"""Every cell of the support matrix against the dense reference: 40 steps, two full re-localization cycles, fp32, and
sizes that divide neither by the rank factor nor by the ranks."""

import pytest

from tests.support.compare import assert_same_run
from tests.support.matrix import CELLS, Cell
from tests.support.training import Run, reference, train, variant

PLAIN = Run()


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(accumulation: int, clipping: float):
        key = (accumulation, clipping)
        if key not in kept:
            kept[key] = reference(variant(PLAIN, accumulation=accumulation, max_grad_norm=clipping))
        return kept[key]

    return of


def marked(cell: Cell):
    return pytest.param(cell, id=cell.label, marks=() if cell.sampled else pytest.mark.slow)


@pytest.mark.parametrize("cell", map(marked, CELLS))
def test_a_cell_of_the_matrix_equals_the_dense_reference(ranks, expected, cell):
    run = variant(PLAIN, accumulation=cell.accumulation, max_grad_norm=cell.clipping, checkpointing=cell.checkpointing)
    name, world_size = cell.engine.name, cell.engine.ranks
    results = [train(name, run)] if world_size == 1 else ranks(world_size, train, name, run)
    for result in results:
        assert_same_run(result, expected(cell.accumulation, cell.clipping))
