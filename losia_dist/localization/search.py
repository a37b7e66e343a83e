"""How rows and columns are chosen, whoever adds up the score: searches that ask for sums and end with a choice.

Dimensions: m rows and n columns of a layer's score s [m, n], of which r rows R and c columns C are chosen so that the sum of s
over R x C is large. A search never sees the score itself, only sums along its rows and columns: at a slot's end they come from
a score that lies sharded over the ranks, before the first step from one pass over calibration batches each.

A search is of one layer, or of several that share their columns: one C, and rows R of each layer's own, so that the sum of all
their scores is large. Queries, sums and choices are lists, one entry a layer. Layers that share columns are of one n and c.

Of X experts all matrices are searched at once: every sum and index has one dimension more, in front.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
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


def keep_without_signal(chosen: Sequence[Choice], present: Sequence[tuple[Tensor, Tensor]]) -> list[Choice]:
    """The choices of a search, or the present rows where a layer's score is zero everywhere: ties would move the subnet to the
    first ones. Columns stay where all layers' scores are. No host synchronisation.

    present: rows int64 [r] and columns int64 [c] of each layer, on the choices' device.
    """
    silent = [(one.total == 0).unsqueeze(-1) for one in chosen]
    all_silent = torch.stack(silent).all(0)
    return [
        one._replace(rows=torch.where(alone, rows, one.rows), columns=torch.where(all_silent, columns, one.columns))
        for one, alone, (rows, columns) in zip(chosen, silent, present, strict=True)
    ]


Sizes = tuple[int, int]
Search = Generator[list[Query], list[Sums], list[Choice]]


def greedy(layers: Sequence[tuple[Sizes, Sizes]]) -> Search:
    """The published greedy (paper algorithm 1): the better one of two candidates. Two queries; one where all rows, or all
    columns, are kept.

    The best rows, then the best columns given them; the best columns, then the best rows given them. The paper's third
    candidate, best rows and best columns independently, has the rows of the first one and columns that are no better given
    those rows, so it can never win.

    Of layers that share columns every layer's best rows are by its own sums, the best columns by the sums of all, and the
    better candidate has more of all their scores.

    Args:
        layers: shape (m, n) and kept (r, c) of each.
    """
    if all(kept[0] == shape[0] for shape, kept in layers) or any(kept[1] == shape[1] for shape, kept in layers):
        return (yield from _one_side(layers))
    c = layers[0][1][1]
    first = yield [Query([None], [None]) for _ in layers]
    rows_first = [_largest(sums.rows[0], kept[0]) for sums, (_, kept) in zip(first, layers, strict=True)]
    columns_first = _largest(_together([sums.columns[0] for sums in first]), c)
    given = yield [Query([columns_first], [rows]) for rows in rows_first]
    columns_given = _largest(_together([sums.columns[0] for sums in given]), c)
    rows_given = [_largest(sums.rows[0], kept[0]) for sums, (_, kept) in zip(given, layers, strict=True)]
    rows_first_inside = [_sum_at(sums.columns[0], columns_given) for sums in given]
    columns_first_inside = [_sum_at(sums.rows[0], rows) for sums, rows in zip(given, rows_given, strict=True)]
    second = _together(columns_first_inside) > _together(rows_first_inside)  # a tensor: no host synchronisation
    return [
        Choice(
            torch.where(second.unsqueeze(-1), rows_given[place], rows_first[place]),
            torch.where(second.unsqueeze(-1), columns_first, columns_given),
            torch.where(second, columns_first_inside[place], rows_first_inside[place]),
            sums.rows[0].sum(-1),
        )
        for place, sums in enumerate(first)
    ]


def _one_side(layers: Sequence[tuple[Sizes, Sizes]]) -> Search:
    """The exact optimum where one side is kept whole: all rows of every layer, or all columns of one."""
    if all(kept[0] == shape[0] for shape, kept in layers):
        found = [sums.columns[0] for sums in (yield [Query(within_rows=[None]) for _ in layers])]
        columns = _largest(_together(found), layers[0][1][1])
        return [
            Choice(_every(shape[0], sums), columns, _sum_at(sums, columns), sums.sum(-1))
            for sums, (shape, _) in zip(found, layers, strict=True)
        ]
    ((shape, kept),) = layers
    (answer,) = yield [Query(within_columns=[None])]
    sums = answer.rows[0]
    rows = _largest(sums, kept[0])
    return [Choice(rows, _every(shape[1], sums), _sum_at(sums, rows), sums.sum(-1))]


def _every(size: int, sums: Tensor) -> Tensor:
    """All indices of a side, for each matrix of the sums."""
    return torch.arange(size, device=sums.device).expand(*sums.shape[:-1], -1).contiguous()


def _together(of_layers: Sequence[Tensor]) -> Tensor:
    """What all layers have: a layer's own where there is one."""
    total = of_layers[0]
    for own in of_layers[1:]:
        total = total + own
    return total


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values of the last dimension, ties to the lower index, sorted ascending."""
    order = torch.sort(values, descending=True, stable=True).indices
    return order[..., :count].sort().values


def _sum_at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index).sum(-1)
