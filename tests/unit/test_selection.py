"""Choosing rows and columns: the greedy search."""

import itertools

import torch

from losia_dist.localization import search
from losia_dist.localization.blocks import RowBlock
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.sharded_choice import select


def greedy(score: torch.Tensor, kept: tuple[int, int]):
    shape = (score.shape[0], score.shape[1])
    (choice,) = select(search.greedy([(shape, kept)]), [score], [RowBlock(shape[0], 1, 0, shape[0])], RowCollectives(None))
    assert abs(choice.total.item() - score.double().sum().item()) < 1e-9
    return choice.rows.tolist(), choice.columns.tolist(), choice.inside.item()


def test_a_planted_block_is_found():
    score = torch.rand(12, 10) * 0.01
    score[torch.tensor([1, 5, 9])[:, None], torch.tensor([0, 7])] += 1.0
    assert greedy(score, (3, 2))[:2] == ([1, 5, 9], [0, 7])


def test_columns_first_wins_where_rows_first_is_misled():
    # Row 0 is the largest row, but spread out; column 0 holds the block.
    score = torch.tensor([[3.0, 3, 3, 3], [8, 0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
    rows, columns, objective = greedy(score, (2, 1))
    assert (rows, columns, objective) == ([1, 2], [0], 17.0)


def test_the_objective_is_the_sum_over_the_chosen_block_and_close_to_the_optimum():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        score = torch.rand(6, 5, generator=generator) ** 4
        rows, columns, objective = greedy(score, (2, 2))
        assert abs(score[rows][:, columns].sum().item() - objective) < 1e-6
        best = max(
            score[list(r)][:, list(c)].sum().item()
            for r in itertools.combinations(range(6), 2)
            for c in itertools.combinations(range(5), 2)
        )
        assert 0.6 * best <= objective <= best + 1e-6


def test_ties_go_to_the_lower_index():
    assert greedy(torch.ones(5, 4), (2, 3))[:2] == ([0, 1], [0, 1, 2])
    assert greedy(torch.zeros(5, 4), (2, 3))[:2] == ([0, 1], [0, 1, 2])


def test_all_rows_or_all_columns_may_be_kept():
    score = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    rows, columns, _ = greedy(score, (2, 8))
    assert columns == list(range(8))
    assert rows == score.sum(1).topk(2).indices.sort().values.tolist()
    assert greedy(score, (6, 2))[1] == score.sum(0).topk(2).indices.sort().values.tolist()
