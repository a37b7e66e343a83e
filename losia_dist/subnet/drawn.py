"""Subnets at random: the same on every rank, in every engine and after a restart, with nothing sent."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def draw_subnet(
    name: str, shape: tuple[int, int], size: tuple[int, int], seed: int, step: int = 0, left_out: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Random rows and columns of a layer: int64 [r] and [c] on the CPU, sorted.

    Seeded by name, so that which layers are targets does not change the subnet of any one of them.

    Args:
        name: of the layer, in the model that was converted.
        shape: (m, n) of its weight. size: (r, c).
        step: optimizer steps done when the subnet is drawn; 0: the first one.
        left_out: columns that are not drawn; at least c others are there.
    """
    key = f"{seed}/{name}" if step == 0 else f"{seed}/{name}/{step}"
    generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(key.encode()))
    drawable = torch.ones(shape[1], dtype=torch.bool, device="cpu")
    drawable[list(left_out)] = False
    candidates = drawable.nonzero().squeeze(1)
    rows, places = (
        torch.randperm(total, generator=generator, device="cpu")[:kept].sort().values
        for total, kept in zip((shape[0], candidates.numel()), size, strict=True)
    )
    return rows, candidates[places]


def draw_subnets(
    names: Sequence[str],
    shape: tuple[int, int],
    size: tuple[int, int],
    seed: int,
    step: int = 0,
    left_out: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """`draw_subnet` of several matrices of one shape: int64 [X, r] and [X, c] on the CPU.

    names: of each (`Site.matrix_names`). left_out: columns that are not drawn, by name.
    """
    drawn = [draw_subnet(name, shape, size, seed, step, (left_out or {}).get(name, ())) for name in names]
    return torch.stack([rows for rows, _ in drawn]), torch.stack([columns for _, columns in drawn])
