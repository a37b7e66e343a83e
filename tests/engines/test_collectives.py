"""Reductions of full gradients by rows: exact, and no more than one whole gradient stays with them."""

import weakref

import pytest
import torch
import torch.distributed as dist

from losia_dist.localization.collectives import RowCollectives


def reduce_several(rows: int) -> list[int]:
    """Start one reduction after the other without waiting; how many whole gradients are there after each."""
    collectives, rank = RowCollectives(dist.group.WORLD), dist.get_rank()
    pending, gradients, living = [], [], []
    for number in range(4):
        gradient = torch.arange(rows * 5.0).view(rows, 5) + 100 * number + rank
        gradients.append(weakref.ref(gradient.untyped_storage()))
        pending.append(collectives.reduce_scatter_rows(gradient))
        del gradient
        living.append(sum(gradient() is not None for gradient in gradients))
    start, stop = collectives.rows_of(rows)
    for number, one in enumerate(pending):
        expected = torch.arange(rows * 5.0).view(rows, 5) + 100 * number + (dist.get_world_size() - 1) / 2
        for received in (one.wait(), one.wait()):
            assert torch.equal(received, expected[start:stop])
    living.append(sum(gradient() is not None for gradient in gradients))
    return living


@pytest.mark.parametrize("rows", [8, 3])  # equal blocks, and a padded copy in the place of the gradient
def test_one_whole_gradient_is_under_way_at_a_time(ranks, rows):
    expected = [1, 1, 1, 1, 0] if rows == 8 else [0, 0, 0, 0, 0]
    assert ranks(2, reduce_several, rows) == [expected] * 2
