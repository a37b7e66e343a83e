"""Choosing rows and columns from a score that is sharded by rows over the ranks.

Dimensions: X matrices (1, or experts) of m rows and n columns; each rank holds its block of all their rows. A query costs X m
numbers for row sums, X n for column sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losia_dist.localization.blocks import RowBlock
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.search import Choice, Query, Search, Sums


@torch.no_grad()
def select(search: Search, scores: Sequence[Tensor], blocks: Sequence[RowBlock], collectives: RowCollectives) -> list[Choice]:
    """Run a search over the scores of its layers; called by all ranks of the collectives, with the result equal on each.

    Sums are taken in float64 and ties go to the lower index, so that the choice hardly depends on the number of ranks. Of
    several matrices (experts) all sums of a query are sent at once.

    Args:
        scores: of each layer this rank's rows of the whole [X m, n] score, fp32, not negative.
        blocks: which rows these are. With X = 1 sums and indices have no dimension for the matrices.
    """
    try:
        queries = next(search)
        while True:
            asked = zip(queries, scores, blocks, strict=True)
            queries = search.send([_answer(query, score, block, collectives) for query, score, block in asked])
    except StopIteration as end:
        choices: list[Choice] = end.value
        return choices


def _answer(query: Query, score: Tensor, block: RowBlock, collectives: RowCollectives) -> Sums:
    """The sums that are asked for of one layer, over all ranks."""

    def row_sums(columns: Tensor | None) -> Tensor:
        mine = torch.zeros(score.shape[0], dtype=torch.float64, device=score.device)
        for place, here, _ in block.pieces():
            chosen = score[here] if columns is None else score[here].index_select(1, _of(columns, place))
            mine[here] = chosen.sum(1, dtype=torch.float64)
        whole = collectives.gather_rows(mine, block.count * block.size)
        return whole if block.count == 1 else whole.view(block.count, block.size)

    def column_sums(rows: Tensor | None) -> Tensor:
        sums = torch.zeros(block.count, score.shape[1], dtype=torch.float64, device=score.device)
        for place, here, inside in block.pieces():
            if rows is None:
                sums[place] = score[here].sum(0, dtype=torch.float64)
            else:
                # How many of the chosen rows are this rank's is known to the device alone: a mask keeps the host out of it.
                sums[place] = masked_column_sums(score[here], mask_of(_of(rows, place), block.size)[inside])
        sums = collectives.sum_columns(sums.view(-1)).view(block.count, score.shape[1])
        return sums[0] if block.count == 1 else sums

    return Sums([row_sums(c) for c in query.within_columns], [column_sums(r) for r in query.within_rows])


def _of(index: Tensor, place: int) -> Tensor:
    return index if index.dim() == 1 else index[place]


def mask_of(rows: Tensor, size: int) -> Tensor:
    """bool [size], True at these rows."""
    mask = torch.zeros(size, dtype=torch.bool, device=rows.device)
    mask[rows] = True
    return mask


def masked_column_sums(score: Tensor, inside: Tensor) -> Tensor:
    """Column sums [n] over the rows where `inside` [b] holds, in float64, a bounded number of rows at a time."""
    sums = torch.zeros(score.shape[1], dtype=torch.float64, device=score.device)
    for rows, mask in zip(score.split(256), inside.split(256), strict=True):
        sums += mask.to(torch.float64) @ rows.to(torch.float64)
    return sums
