"""The published greedy choice of rows and columns (paper algorithm 1), over a score that is sharded by rows.

Dimensions: m rows, n columns; each rank holds its block of rows. Per layer 2 m + 2 n numbers are communicated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losia_dist.localization.collectives import RowCollectives


@torch.no_grad()
def select_greedy(
    score: Tensor, shape: tuple[int, int], kept: tuple[int, int], collectives: RowCollectives
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows R and columns C with |R|, |C| = kept that make the sum of the score over R x C large.

    Two candidates: the best rows, then the best columns given them; the best columns, then the best rows given them.
    The paper's third candidate, best rows and best columns independently, has the rows of the first one and columns that
    are no better given those rows, so it can never win.

    Args:
        score: this rank's rows of the whole [m, n] score, fp32, not negative.

    Returns:
        R and C, int64, sorted ascending, and the objective (float64 scalar); equal on every rank. Sums are taken in
        float64 and ties go to the lower index, so that the choice hardly depends on the number of ranks.
    """
    total_rows = shape[0]
    row_count, column_count = kept
    start, stop = collectives.rows_of(total_rows)

    def column_sums(rows: Tensor | None) -> Tensor:
        if rows is None:
            return collectives.sum_columns(score.sum(0, dtype=torch.float64))
        # How many of the chosen rows are this rank's is known to the device alone: a mask keeps the host out of it.
        inside = torch.zeros(total_rows, dtype=torch.bool, device=score.device)
        inside[rows] = True
        return collectives.sum_columns(_masked_column_sums(score, inside[start:stop]))

    def row_sums(columns: Tensor | None) -> Tensor:
        mine = score if columns is None else score.index_select(1, columns)
        return collectives.gather_rows(mine.sum(1, dtype=torch.float64), total_rows)

    rows_first = _largest(row_sums(None), row_count)
    sums = column_sums(rows_first)
    columns_given = _largest(sums, column_count)
    rows_first_objective = sums[columns_given].sum()

    columns_first = _largest(column_sums(None), column_count)
    sums = row_sums(columns_first)
    rows_given = _largest(sums, row_count)
    columns_first_objective = sums[rows_given].sum()

    take_second = columns_first_objective > rows_first_objective  # a tensor: no host synchronisation
    rows = torch.where(take_second, rows_given, rows_first)
    columns = torch.where(take_second, columns_first, columns_given)
    return rows, columns, torch.where(take_second, columns_first_objective, rows_first_objective)


def _masked_column_sums(score: Tensor, inside: Tensor) -> Tensor:
    """Column sums over the rows where `inside` holds, in float64, a bounded number of rows at a time."""
    sums = torch.zeros(score.shape[1], dtype=torch.float64, device=score.device)
    for rows, mask in zip(score.split(256), inside.split(256), strict=True):
        sums += mask.to(torch.float64) @ rows.to(torch.float64)
    return sums


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values, ties to the lower index, sorted ascending."""
    order = torch.sort(values, descending=True, stable=True).indices
    return order[:count].sort().values
