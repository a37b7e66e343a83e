"""Subnets at random: the same on every rank, in every engine and after a restart, with nothing sent."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losia_dist.config.losia_config import LoSiAConfig


@dataclass(frozen=True)
class Draw:
    """How a run draws subnets.

    seed: of the configuration.
    share_columns: whether linear layers of one module with inputs of one width draw the same columns (`Drawn.share_columns`).
    """

    seed: int
    share_columns: bool = False

    @classmethod
    def of(cls, config: LoSiAConfig) -> Draw:
        """The one of a run with these settings."""
        return cls(config.seed, config.share_columns)

    def subnet(
        self,
        name: str,
        shape: tuple[int, int],
        size: tuple[int, int],
        step: int = 0,
        left_out: Sequence[int] = (),
        *,
        linear: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Random rows and columns of a layer: int64 [r] and [c] on the CPU, sorted.

        Seeded by name, so that which layers are targets does not change the subnet of any one of them.

        Args:
            name: of the layer, in the model that was converted.
            shape: (m, n) of its weight. size: (r, c).
            step: optimizer steps done when the subnet is drawn; 0: the first one.
            left_out: columns that are not drawn; at least c others are there.
            linear: a linear layer; not an expert of a fused weight, which shares its columns with no other.
        """
        end = f"/{step}" if step else ""
        generator = _seeded(f"{self.seed}/{name}{end}")
        rows = _some(torch.arange(shape[0], device="cpu"), size[0], generator)
        if self.share_columns and linear:
            parent = name.rpartition(".")[0]
            generator = _seeded(f"{self.seed}/{parent}/columns of {shape[1]}{end}")
        drawable = torch.ones(shape[1], dtype=torch.bool, device="cpu")
        drawable[list(left_out)] = False
        return rows, _some(drawable.nonzero().squeeze(1), size[1], generator)

    def subnets(
        self,
        names: Sequence[str],
        shape: tuple[int, int],
        size: tuple[int, int],
        step: int = 0,
        left_out: Mapping[str, Sequence[int]] | None = None,
        *,
        linear: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """`subnet` of several matrices of one shape: int64 [X, r] and [X, c] on the CPU.

        names: of each (`Site.matrix_names`). left_out: columns that are not drawn, by name.
        """
        drawn = [self.subnet(name, shape, size, step, (left_out or {}).get(name, ()), linear=linear) for name in names]
        return torch.stack([rows for rows, _ in drawn]), torch.stack([columns for _, columns in drawn])


def _seeded(key: str) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(zlib.crc32(key.encode()))


def _some(candidates: Tensor, kept: int, generator: torch.Generator) -> Tensor:
    """So many of them, in their order."""
    return candidates[torch.randperm(candidates.numel(), generator=generator, device="cpu")[:kept].sort().values]
