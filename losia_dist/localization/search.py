"""How rows and columns are chosen, whoever adds up the score: searches that ask for sums and end with a choice.

Dimensions: m rows and n columns of a layer's score s [m, n], of which r rows R and c columns C are chosen so that the sum of s
over R x C is large. A search never sees the score itself, only sums along its rows and columns: at a slot's end they come from
a score that lies sharded over the ranks, before the first step from one pass over calibration batches each.

Of X experts all matrices are searched at once: every sum and index has one dimension more, in front.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Query:
    """Sums that a search needs next; None stands for all columns (all rows).

    within_columns: for each entry, int64 [c] (or [X, c]), the sum of every row over these columns. within_rows: likewise.
    """

    within_columns: list[Tensor | None] = field(default_factory=list)
    within_rows: list[Tensor | None] = field(default_factory=list)


@dataclass(frozen=True)
class Sums:
    """Answer to a query, float64 and equal on every rank: rows [m] and columns [n] (or [X, m], [X, n]), in the order in which
    they were asked.
    """

    rows: list[Tensor]
    columns: list[Tensor]


class Choice(NamedTuple):
    """A subnet: rows int64 [r] and columns int64 [c], sorted; the score inside it and in all of the layer, float64 [].

    Of experts [X, r], [X, c] and [X]. A total of 0: no gradient other than zero came, and nothing was chosen. Of -1: no score
    was measured.
    """

    rows: Tensor
    columns: Tensor
    inside: Tensor
    total: Tensor

    @classmethod
    def unmeasured(cls, rows: Tensor, columns: Tensor) -> Choice:
        """A subnet that was not chosen by a score: rows int64 [r] and columns int64 [c], sorted; or those of experts."""
        each = rows.shape[:-1]
        return cls(rows, columns, rows.new_zeros(each, dtype=torch.float64), rows.new_full(each, -1, dtype=torch.float64))


def keep_without_signal(chosen: Choice, present: tuple[Tensor, Tensor]) -> Choice:
    """The choice, or the present rows and columns where the score is zero everywhere: ties would move the subnet to the first
    rows and columns. No host synchronisation.

    present: rows int64 [r] and columns int64 [c], on the choice's device.
    """
    silent = (chosen.total == 0).unsqueeze(-1)
    rows, columns = (torch.where(silent, old, new) for new, old in zip(chosen[:2], present, strict=True))
    return chosen._replace(rows=rows, columns=columns)


Search = Generator[Query, Sums, Choice]
Sizes = tuple[int, int]


def greedy(shape: Sizes, kept: Sizes) -> Search:
    """The published greedy (paper algorithm 1): the better one of two candidates. Two queries; one where all rows, or all
    columns, are kept.

    The best rows, then the best columns given them; the best columns, then the best rows given them. The paper's third
    candidate, best rows and best columns independently, has the rows of the first one and columns that are no better given
    those rows, so it can never win.

    Args:
        shape: (m, n). kept: (r, c).
    """
    if kept[0] == shape[0] or kept[1] == shape[1]:
        return (yield from _one_side(shape, kept))
    first = yield Query([None], [None])
    rows_first, columns_first = _largest(first.rows[0], kept[0]), _largest(first.columns[0], kept[1])
    given = yield Query([columns_first], [rows_first])
    columns_given, rows_given = _largest(given.columns[0], kept[1]), _largest(given.rows[0], kept[0])
    rows_first_inside, columns_first_inside = _sum_at(given.columns[0], columns_given), _sum_at(given.rows[0], rows_given)
    second = columns_first_inside > rows_first_inside  # a tensor: no host synchronisation
    return Choice(
        torch.where(second.unsqueeze(-1), rows_given, rows_first),
        torch.where(second.unsqueeze(-1), columns_first, columns_given),
        torch.where(second, columns_first_inside, rows_first_inside),
        first.rows[0].sum(-1),
    )


def _one_side(shape: Sizes, kept: Sizes) -> Search:
    """The exact optimum where one side is kept whole."""
    all_rows = kept[0] == shape[0]
    answer = yield Query(within_rows=[None]) if all_rows else Query(within_columns=[None])
    sums = answer.columns[0] if all_rows else answer.rows[0]
    chosen = _largest(sums, kept[all_rows])
    every = torch.arange(shape[not all_rows], device=sums.device).expand(*sums.shape[:-1], -1).contiguous()
    rows, columns = (every, chosen) if all_rows else (chosen, every)
    return Choice(rows, columns, _sum_at(sums, chosen), sums.sum(-1))


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values of the last dimension, ties to the lower index, sorted ascending."""
    order = torch.sort(values, descending=True, stable=True).indices
    return order[..., :count].sort().values


def _sum_at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index).sum(-1)
