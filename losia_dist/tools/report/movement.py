"""Where subnets lie and how they moved, summed up while `subnets.jsonl` is read: no more than two subnets a layer are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass
class Layer:
    """A linear layer [m, n] and its subnets.

    kind: its name within the group ("mlp.up_proj"). rows, columns: the first and the latest choice, sorted.
    captured: share of the layer's importance inside the latest subnet whose share was measured.
    """

    name: str
    group: str
    kind: str
    shape: tuple[int, int]
    first: tuple[Indices, Indices]
    latest: tuple[Indices, Indices]
    captured: float | None = None

    @property
    def random_share(self) -> float:
        """Share of the weight that the subnet takes, which is what a random one captures on average."""
        return len(self.latest[0]) * len(self.latest[1]) / (self.shape[0] * self.shape[1])


@dataclass
class Move:
    """A layer's subnet was set anew. overlap: share of its (rows, columns) that were chosen before too; None at the first."""

    step: int
    reason: str
    layer: Layer
    captured: float | None
    overlap: tuple[float, float] | None


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
            rows, columns = _indices(record["rows"], m), _indices(record["columns"], n)
            captured = None if record.get("captured") is None else float(record["captured"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return False
        for indices, size in ((rows, m), (columns, n)):
            if indices.ndim != 1 or not len(indices) or indices.min() < 0 or indices.max() >= size:
                return False
        chosen, overlap = (rows, columns), None
        layer = self.layers.get(name)
        if layer is None or layer.shape != (m, n):
            kind = name.removeprefix(group).lstrip(".") or name
            layer = self.layers[name] = Layer(name, group, kind, (m, n), chosen, chosen)
        else:
            overlap = (_share_kept(layer.latest[0], rows), _share_kept(layer.latest[1], columns))
            layer.latest = chosen
        if captured is not None:
            layer.captured = captured
        self.moves.append(Move(step, reason, layer, captured, overlap))
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


def _indices(written: Any, size: int) -> Indices:
    return np.arange(size) if written == "all" else np.asarray(written, dtype=np.int64)


def _share_kept(old: Indices, new: Indices) -> float:
    return len(np.intersect1d(old, new, assume_unique=True)) / len(new)
