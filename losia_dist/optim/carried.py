"""Adam's moments of a subnet that moves: those of weights that stay go along, those of new weights are begun."""

from __future__ import annotations

import torch
from torch import Tensor

from losia_dist.errors import ConfigError


def carry_state(
    state: dict[str, Tensor], old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], values: Tensor
) -> dict[str, Tensor]:
    """The optimizer's entries of a subnet after its move from the rows and columns `old` to `new`.

    An entry of a weight that is in both subnets stays. A new weight begins with a mean of 0 and, so that its first updates
    are not too large under a step count that goes on, with a mean square estimated from what stays of its row and column:
    v_ij = r_i c_j / v, where r_i and c_j are the old subnet's means over row i and column j, its mean v for a row or column
    that was not in it (the factored estimate of Adafactor: Shazeer and Stern, arXiv 1804.04235). Step counts go on.

    Args:
        state: as `StateAccess.read_state` gives it, of the old subnet [r, c].
        old, new: (rows [r], columns [c]), sorted int64.
        values: of the new subnet in the weight, [r, c]; they become the entry "value", in its dtype.

    Returns:
        entries for `StateAccess.write_state`. Nothing is communicated, and nothing beyond [r, c] is made.

    Raises:
        ConfigError: an optimizer whose entries are not one number per weight. Same on every rank.
    """
    rows, columns = _Places(old[0], new[0]), _Places(old[1], new[1])
    moved: dict[str, Tensor] = {}
    for name, entry in state.items():
        if name == "value":
            moved[name] = values.to(entry.dtype)
        elif not entry.dim():
            moved[name] = entry
        elif entry.shape != values.shape:
            raise ConfigError(
                f"moments='kept' needs an optimizer that keeps one number per weight, and its {name!r} is "
                f"{list(entry.shape)} for a subnet of {list(values.shape)}. Use LoSiAAdamW, or moments='cleared'."
            )
        else:
            began = _factored(entry, rows, columns) if "exp_avg_sq" in name else entry.new_zeros(())
            stays = rows.stays[:, None] & columns.stays[None, :]
            moved[name] = torch.where(stays, entry[rows.place[:, None], columns.place[None, :]], began)
    return moved


class _Places:
    """For each new index: whether it was among the old ones, and its place there (any place where it was not)."""

    def __init__(self, old: Tensor, new: Tensor) -> None:
        self.place = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
        self.stays = old[self.place] == new

    def of(self, known: Tensor, otherwise: Tensor) -> Tensor:
        """What is known of each old index, for each new one."""
        return torch.where(self.stays, known[self.place], otherwise)


def _factored(squares: Tensor, rows: _Places, columns: _Places) -> Tensor:
    mean = squares.mean()
    # Divided before it is multiplied: a product of two small squares would underflow.
    by_column = columns.of(squares.mean(0), mean) / mean.clamp_min(torch.finfo(mean.dtype).tiny)
    return rows.of(squares.mean(1), mean)[:, None] * by_column[None, :]
