"""`ExpertsOverlay`: what subnets left in the quantized matrices of experts, for all experts of a weight together.

Dimensions in names: E experts of the weight, X of them that localize together, m and n neurons, r and c rows and columns of a
subnet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from losia_dist.subnet.differences import Differences, Left
from losia_dist.subnet.overlay import BLOCK, DECODE, ENCODE, whole_size

_PIECES = 32  # in which a difference of the whole weight is read, so that it is never there a second time


class ExpertsOverlay(Differences):
    """The differences between the matrices of experts and their codes' values, in the order in which subnets left them.

    Args:
        shape: (E, m, n), output neurons before input neurons, however the weight is stored.
        form: how a difference is stored, as for `Overlay`; in "int8" each row of each expert has a scale.
    """

    def __init__(self, shape: tuple[int, int, int], form: str) -> None:
        super().__init__()
        self.shape, self.form = shape, form

    def add(self, experts: Tensor, rows: Tensor, columns: Tensor, difference: Tensor) -> None:
        """Keep differences [X, r, c], fp32. Those that take more than one of all matrices would become that one.

        experts int64 [X], rows [X, r], columns [X, c], sorted all.
        """
        index = (rows, columns, experts)
        sizes = (self.shape[1], self.shape[2], self.shape[0])
        kept = [None if one.shape[-1] == size else one.clone() for one, size in zip(index, sizes, strict=True)]
        self.append(Left(kept[0], kept[1], *ENCODE[self.form](difference), kept[2]))
        if len(self) > 1 and self.whole_bytes > whole_size(self.form, self.shape):
            self.write([self._folded(difference.device)])

    def add_to(self, matrices: Tensor) -> Tensor:
        """matrices [E, m, n], maybe a view, += all differences, in place; returns them. The host does not wait."""
        for one in self.read():
            if one.rows is None and one.columns is None and one.experts is None:
                for start, stop in self._pieces():
                    matrices[start:stop] += self._decode_experts(one, start, stop, matrices)
                continue
            experts, rows, columns = self._index(one, matrices.device)
            places = (experts.view(-1, 1, 1), rows.unsqueeze(-1), columns.unsqueeze(-2))
            shape = (experts.shape[0], rows.shape[-1], columns.shape[-1])
            difference = DECODE[self.form](one.codes.to(matrices.device), one.scales.to(matrices.device), shape, matrices.dtype)
            matrices.index_put_(places, matrices[places] + difference)  # each place once
        return matrices

    def add_to_block(self, block: Tensor, experts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """What `add_to` would make of these places, given as block [X, r, c], in place.

        experts int64 [X], rows [X, r], columns [X, c], sorted all.
        """
        return self._add_to_block(self.read(), block, experts, rows, columns)

    def _add_to_block(self, lefts: Iterable[Left], block: Tensor, experts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        for one in lefts:
            device = block.device
            theirs, their_rows, their_columns = self._index(one, device)
            expert, is_there = _find(theirs.unsqueeze(0), experts.unsqueeze(0))
            expert, is_there = expert.squeeze(0), is_there.squeeze(0)
            row, has_row = _find(_of(their_rows, expert), rows)
            column, has_column = _find(_of(their_columns, expert), columns)
            shape = their_rows.shape[-1], their_columns.shape[-1]
            flat = (expert.view(-1, 1, 1) * shape[0] + row.unsqueeze(-1)) * shape[1] + column.unsqueeze(-2)
            inside = is_there.view(-1, 1, 1) & has_row.unsqueeze(-1) & has_column.unsqueeze(-2)
            block += self._decode_at(one, flat, shape[1], block.dtype).masked_fill_(~inside, 0)
        return block

    def _folded(self, device: torch.device) -> Left:
        """All differences as one of all matrices."""
        _, m, n = self.shape
        there, parts = list(self.read()), []
        for start, stop in self._pieces():
            zeros = torch.zeros(stop - start, m, n, dtype=torch.float32, device=device)
            index = [torch.arange(size, device=device).expand(stop - start, -1).contiguous() for size in (m, n)]
            whole = self._add_to_block(there, zeros, torch.arange(start, stop, device=device), *index)
            parts.append(ENCODE[self.form](whole))
        codes, scales = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return Left(None, None, codes, scales)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Experts [start, stop) of parts of a difference of the whole; no scale belongs to two."""
        E, m, n = self.shape
        step = -(-E // _PIECES)
        if self.form == "nf4" and step * m * n % BLOCK:
            step = E
        return ((start, min(E, start + step)) for start in range(0, E, step))

    def _decode_experts(self, one: Left, start: int, stop: int, like: Tensor) -> Tensor:
        """Differences of experts [start, stop) out of one of the whole."""
        _, m, n = self.shape
        codes, scales = one.codes, one.scales
        if self.form == "nf4":
            codes, scales = (
                tensor[start * m * n // each : -(-stop * m * n // each)] for tensor, each in ((codes, 2), (scales, BLOCK))
            )
        else:
            codes, scales = codes[start:stop], scales[start:stop]
        return DECODE[self.form](codes.to(like.device), scales.to(like.device), (stop - start, m, n), like.dtype)

    def _decode_at(self, one: Left, flat: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Single differences, as `DECODE` gives them. flat: int64, counted over [X, r, c]; columns: c."""
        codes, scales = one.codes.to(flat.device).view(-1), one.scales.to(flat.device).view(-1)
        if self.form == "int8":
            return (codes[flat] * scales[flat // columns]).to(dtype)
        if self.form != "nf4":
            return codes[flat].to(dtype)
        from bitsandbytes.functional import get_4bit_type

        code = (codes[flat // 2].to(torch.int64) >> 4 * (1 - flat % 2)) & 15
        return (get_4bit_type("nf4", device=flat.device)[code] * scales[flat // BLOCK].to(torch.float32)).to(dtype)

    def _index(self, one: Left, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """experts int64 [X], rows [X, r] or [1, m], columns [X, c] or [1, n]."""
        E, m, n = self.shape
        experts = torch.arange(E, device=device) if one.experts is None else one.experts.to(device)
        rows = torch.arange(m, device=device).unsqueeze(0) if one.rows is None else one.rows.to(device)
        columns = torch.arange(n, device=device).unsqueeze(0) if one.columns is None else one.columns.to(device)
        return experts, rows, columns


def _of(index: Tensor, expert: Tensor) -> Tensor:
    """The rows or columns of experts in these places: [X, k]."""
    return index.expand(expert.shape[0], -1) if index.shape[0] == 1 else index[expert]


def _find(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted number stands in its sorted index, and whether it does: [X, k] and [X, j] -> [X, j] both."""
    place = torch.searchsorted(index.contiguous(), wanted.contiguous()).clamp_(max=index.shape[-1] - 1)
    return place, index.gather(-1, place) == wanted
