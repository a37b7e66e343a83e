"""Choosing rows and columns from a score that is sharded by rows over the ranks.

Dimensions: m rows, n columns; each rank holds its block of rows. A query costs m numbers for row sums, n for column sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.search import Choice, Search, Sums


@torch.no_grad()
def select(search: Search, score: Tensor, total_rows: int, collectives: RowCollectives) -> Choice:
    """Run a search over a score; called by all ranks of the collectives, with the result equal on each.

    Sums are taken in float64 and ties go to the lower index, so that the choice hardly depends on the number of ranks.

    Args:
        score: this rank's rows of the whole [m, n] score, fp32, not negative.
        total_rows: m.
    """
    start, stop = collectives.rows_of(total_rows)

    def row_sums(columns: Tensor | None) -> Tensor:
        mine = score if columns is None else score.index_select(1, columns)
        return collectives.gather_rows(mine.sum(1, dtype=torch.float64), total_rows)

    def column_sums(rows: Tensor | None) -> Tensor:
        if rows is None:
            return collectives.sum_columns(score.sum(0, dtype=torch.float64))
        # How many of the chosen rows are this rank's is known to the device alone: a mask keeps the host out of it.
        return collectives.sum_columns(masked_column_sums(score, mask_of(rows, total_rows)[start:stop]))

    try:
        query = next(search)
        while True:
            sums = Sums([row_sums(c) for c in query.within_columns], [column_sums(r) for r in query.within_rows])
            query = search.send(sums)
    except StopIteration as end:
        choice: Choice = end.value
        return choice


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
