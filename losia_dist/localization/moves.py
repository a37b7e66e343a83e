"""What happened when a layer got another subnet: handed to `losia.on_move` listeners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from losia_dist.localization.search import Choice
from losia_dist.subnet.site import Site

Reason = Literal["located", "relocalized"]


@dataclass(frozen=True)
class SubnetMove:
    """A layer's new subnet, as every rank sees it right after it was set.

    Attributes:
        step: optimizer steps done when the subnet was set; 0 before the first.
        reason: `located` by calibration batches before training, `relocalized` at the end of a time slot.
        layer: name of the linear layer in the model; of experts, of the weight (and the part), each with a subnet of its own.
        group: name of the group (decoder layer, or output layer) that it belongs to.
        shape: (m, n) of a whole matrix: output neurons, input neurons.
        rows: int64 [floor(p_r m)], sorted, on the device; of X experts [X, floor(p_r m)].
        columns: int64 [floor(p_c n)], sorted, on the device; of X experts [X, floor(p_c n)].
        captured: share of all importance of the layer that lies inside the subnet, 0 to 1; None where it was not measured.
        random_share: share that a random subnet of this size holds in expectation: p_r p_c.
    """

    step: int
    reason: Reason
    layer: str
    group: str
    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    captured: float | None
    random_share: float


def describe_moves(step: int, reason: Reason, sites: Sequence[Site], choices: Sequence[Choice]) -> Iterator[SubnetMove]:
    """The moves of these layers. Waits for the device."""
    parts = torch.stack([torch.stack([choice.inside.sum(), choice.total.sum()]) for choice in choices]).tolist()
    for site, choice, (inside, total) in zip(sites, choices, parts, strict=True):
        yield SubnetMove(
            step=step,
            reason=reason,
            layer=site.name,
            group=site.group_name,
            shape=site.shape,
            rows=choice.rows,
            columns=choice.columns,
            captured=inside / total if total > 0 else None,
            random_share=site.subnet_size / site.size,
        )
