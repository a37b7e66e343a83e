"""What docs/algorithm.md says of experts besides arithmetic: which groups there are, and what enters an expert.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LIMIT = 2**29


@dataclass
class Layer:
    """A decoder layer: names of its linear layers' weights, and of its experts' with (E, m, n)."""

    name: str
    linear: list[str] = field(default_factory=list)
    fused: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def parts_of(layer: Layer, per_slot: int | str, drawn: bool) -> list[tuple[int, int]]:
    """(first, one past the last) expert of each part that a layer's experts are cut into."""
    if not layer.fused:
        return []
    experts = next(iter(layer.fused.values()))[0]
    if per_slot == "auto":
        numbers = sum(m * n for _, m, n in layer.fused.values())  # of one expert's full gradient
        count = 1
        while not drawn and -(-experts // count) > 1 and -(-experts // count) * numbers > LIMIT:
            count += 1
        per_slot = -(-experts // count)
    assert isinstance(per_slot, int)
    return [(first, min(first + per_slot, experts)) for first in range(0, experts, per_slot)]


def groups_of(
    layers: list[Layer], output: list[str], per_slot: int | str, drawn: bool
) -> tuple[dict[str, list[str]], dict[str, tuple[str, int, int]]]:
    """Group name -> keys of its subnets, in localization order; key of a subnet of experts -> (weight, first, last + 1).

    output: the output layer's weight, if it takes part.
    """
    groups: dict[str, list[str]] = {}
    experts: dict[str, tuple[str, int, int]] = {}
    for layer in layers:
        if layer.linear:
            groups[layer.name] = list(layer.linear)
        parts = parts_of(layer, per_slot, drawn)
        for first, last in parts:
            span = f"[{first}:{last}]" if len(parts) > 1 else ""
            group = f"{layer.name}.experts{span}" if span else layer.name
            for weight in layer.fused:
                experts[f"{weight}{span}"] = (weight, first, last)
                groups.setdefault(group, []).append(f"{weight}{span}")
    if output:
        groups[output[0].removesuffix(".weight")] = output
    return groups, experts


class ExpertInputs(TorchFunctionMode):
    """Keeps what is multiplied with each expert's matrix while Transformers' own eager code runs.

    inputs: (weight name, expert) -> one [tokens, n] for each call that sent the expert a token.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.matrices: list[tuple[Tensor, str, int]] = []
        self.inputs: dict[tuple[str, int], list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.names:
            self.matrices.append((result, self.names[id(args[0])], int(args[1])))
        elif func in (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            for matrix, name, expert in self.matrices:
                if args[1] is matrix:
                    self._keep(name, expert, args[0])
        elif func is torch.bmm and id(args[1]) in self.names:  # all experts at once: tokens of others come as zeros
            for expert, tokens in enumerate(args[0]):
                self._keep(self.names[id(args[1])], expert, tokens[tokens.detach().any(-1)])
        return result

    def _keep(self, name: str, expert: int, tokens: Tensor) -> None:
        if len(tokens):
            self.inputs.setdefault((name, expert), []).append(tokens.detach())
