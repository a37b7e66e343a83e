"""The importance of one layer while its group localizes, kept for this rank's block of rows only.

The matrices of experts lie under each other: X m rows are cut into blocks as the m rows of a linear layer are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losia_dist.localization.blocks import RowBlock
from losia_dist.localization.collectives import PendingRows, RowCollectives
from losia_dist.localization.importance import fold_importance_, has_signal


class ImportanceAccumulator:
    """Receives the full gradient of every micro-batch in backward, and turns it into importance.

    State on each rank for the length of one slot: fp32 blocks [ceil(X m / world size), n] for Ibar and Ubar. Until an optimizer
    step ends, this rank's rows of the gradient too: as they came from a single micro-batch, summed in fp32 from several.

    A gradient that is zero in all of a matrix, on all ranks, says nothing (no label, no advantage, no token for an expert): it
    leaves the averages as they are. One number a matrix and optimizer step is communicated for that.

    Args:
        shape: (m, n) of a whole matrix. count: X matrices; 1 for a linear layer.
        collectives: over all ranks that see different data.
        weight_is_resident: the weight stays as it is until the importance is taken; otherwise the row block is copied in
            backward, while it is there.
        first: place among a weight's matrices of the first of these, where experts are spread over ranks.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        device: torch.device,
        collectives: RowCollectives,
        importance: str,
        betas: tuple[float, float],
        weight_is_resident: bool,
        count: int = 1,
        first: int = 0,
    ) -> None:
        self.shape, self.collectives, self.kind, self.betas = shape, collectives, importance, betas
        self.weight_is_resident = weight_is_resident
        self.rows = RowBlock(shape[0], count, *collectives.rows_of(count * shape[0]))
        above = first * shape[0]
        self.start, self.stop = above + self.rows.start, above + self.rows.stop  # among all rows of the weight
        block = (self.stop - self.start, shape[1])
        self.mean = torch.zeros(block, dtype=torch.float32, device=device)
        self.deviation = torch.zeros_like(self.mean)
        self.gradient: Tensor | None = None  # of the optimizer step in progress
        self.weight_rows: Tensor | None = None
        self.pending: PendingRows | None = None

    @torch.no_grad()
    def __call__(self, gradient: Tensor, weight: Tensor) -> None:
        """Called in backward with the full gradient [m, n] (or [X, m, n]) of one micro-batch, which it keeps and uses up;
        returns while the transfer runs.

        One transfer of a layer is under way at a time: the next one first waits for the one before it.
        """
        self._drain()
        self.pending = self.collectives.reduce_scatter_rows(gradient.reshape(-1, gradient.shape[-1]))
        rows, is_view = self.rows.take(weight.detach())
        self.weight_rows = rows.clone() if is_view and not self.weight_is_resident else rows
        if self.collectives.world_size == 1:
            self._drain()  # nothing to overlap with

    def end_step(self) -> None:
        """Fold this optimizer step's gradient into the averages. The gradient has not been clipped."""
        self._drain()
        if self.gradient is not None and self.weight_rows is not None:
            signal = self.collectives.largest(self.rows.of_each(self.gradient, has_signal)).bool()
            signal = signal[0] if self.rows.count == 1 else self.rows.by_row(signal).unsqueeze(1)
            settings: Any = {"kind": self.kind, "betas": self.betas, "signal": signal}
            fold_importance_(self.gradient, self.weight_rows, self.mean, self.deviation, **settings)
        self._forget()

    def discard_step(self) -> None:
        """Forget the gradient of a step that the engine skipped."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        self._forget()

    def score(self) -> Tensor:
        """s = Ibar * Ubar for this rank's rows, fp32 [<= b, n]; uses up the averages."""
        return self.mean.mul_(self.deviation)

    @torch.no_grad()
    def _drain(self) -> None:
        if self.pending is None:
            return
        rows = self.pending.wait()
        self.pending = None
        if self.gradient is None:
            self.gradient = rows
        else:
            self.gradient = self.gradient.to(torch.float32).add_(rows)

    def _forget(self) -> None:
        self.gradient = self.weight_rows = None


Accumulators = Sequence[ImportanceAccumulator | None]  # of layers, in their order; None: none, or another rank collects
