"""Where subnets lie and how they moved, summed up while `subnets.jsonl` is read: no more than two subnets a layer are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_SAMPLED = 256  # rows and columns of a layer by which its coverage is told; a narrower side is looked at whole


@dataclass
class Layer:
    """A linear layer [m, n] and its subnets; or experts, each of that size.

    kind: its name within the group ("mlp.up_proj"). first, latest: rows and columns chosen, sorted; those of expert e are
    counted from e m and e n on. count: experts, 1 for a linear layer. captured: share of the layer's importance inside the
    latest subnet whose share was measured.
    """

    name: str
    group: str
    kind: str
    shape: tuple[int, int]
    first: tuple[Indices, Indices]
    latest: tuple[Indices, Indices]
    count: int = 1
    captured: float | None = None
    _seen: NDArray[np.bool_] | None = None

    def cover(self, rows: Indices, columns: Indices) -> float:
        """Note a subnet; returns the share of the weight that has been in one so far. Of experts the first one is looked at.
        Exact for sides of up to 256, else told by so many rows and columns at even distances."""
        sides = [np.unique(np.linspace(0, size - 1, min(size, _SAMPLED)).round()).astype(np.int64) for size in self.shape]
        if self._seen is None:
            self._seen = np.zeros([len(side) for side in sides], dtype=bool)
        self._seen |= np.isin(sides[0], rows)[:, None] & np.isin(sides[1], columns)[None, :]
        return float(self._seen.mean())

    @property
    def covered(self) -> float:
        """Share of the weight that has been in a subnet so far."""
        return 0.0 if self._seen is None else float(self._seen.mean())

    @property
    def random_share(self) -> float:
        """Share of the weight that the subnet takes, which is what a random one captures on average."""
        return self.taken[0] * self.taken[1] / (self.shape[0] * self.shape[1])

    @property
    def taken(self) -> tuple[int, int]:
        """(r, c) of one subnet."""
        return len(self.latest[0]) // self.count, len(self.latest[1]) // self.count


@dataclass
class Move:
    """A layer's subnet was set anew. overlap: share of its (rows, columns) that were chosen before too; None at the first.
    covered: share of the weight that has been in a subnet by now."""

    step: int
    reason: str
    layer: Layer
    captured: float | None
    overlap: tuple[float, float] | None
    covered: float = 0.0


@dataclass
class Movement:
    """All layers of a run by name, in the order they were first met, and all moves in theirs."""

    layers: dict[str, Layer] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> bool:
        """Take in one line of subnets.jsonl; False if it is not one."""
        try:
            step, reason = int(record["step"]), str(record["reason"])
            name, group = str(record["layer"]), str(record["group"])
            m, n = map(int, record["shape"])
            sides = [record[side] for side in ("rows", "columns")]
            counts = {_experts(side) for side in sides if side != "all"} or {0}
            rows, columns = (_indices(side, size, *counts) for side, size in zip(sides, (m, n), strict=True))
            captured = None if record.get("captured") is None else float(record["captured"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return False
        if rows is None or columns is None:
            return False
        chosen, overlap = (rows, columns), None
        layer = self.layers.get(name)
        if layer is None or layer.shape != (m, n):
            kind = name.removeprefix(group).lstrip(".") or name
            layer = self.layers[name] = Layer(name, group, kind, (m, n), chosen, chosen, max(1, *counts))
        else:
            overlap = (_share_kept(layer.latest[0], rows), _share_kept(layer.latest[1], columns))
            layer.latest = chosen
        if captured is not None:
            layer.captured = captured
        self.moves.append(Move(step, reason, layer, captured, overlap, layer.cover(rows, columns)))
        return True

    def groups(self) -> list[str]:
        """In the order they were first met: by depth."""
        return list(dict.fromkeys(layer.group for layer in self.layers.values()))

    def kinds(self) -> list[str]:
        """Kinds of layers, in the order they were first met."""
        return list(dict.fromkeys(layer.kind for layer in self.layers.values()))

    def of_kind(self, kind: str) -> list[Layer]:
        """By depth."""
        return [layer for layer in self.layers.values() if layer.kind == kind]


def _experts(written: Any) -> int:
    """How many experts a line lists indices of; 0 for a linear layer."""
    return len(written) if written and isinstance(written[0], list) else 0


def _indices(written: Any, size: int, experts: int) -> Indices | None:
    """Indices of each expert, one behind the other; None if they are none."""
    matrices = max(1, experts)
    if written == "all":
        return np.arange(matrices * size)
    indices = np.asarray(written, dtype=np.int64)
    if indices.ndim != 1 + bool(experts) or not indices.size or indices.min() < 0 or indices.max() >= size:
        return None
    return (indices.reshape(matrices, -1) + size * np.arange(matrices)[:, None]).reshape(-1)


def _share_kept(old: Indices, new: Indices) -> float:
    return len(np.intersect1d(old, new, assume_unique=True)) / len(new)
