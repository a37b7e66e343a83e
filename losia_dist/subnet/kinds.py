"""Which modules are linear layers, and which way round each of them stores its weight.

Everywhere in this package rows are output neurons (m) and columns are input neurons (n). `nn.Linear` stores [m, n];
Transformers' `Conv1D` (GPT-2) computes the same layer and stores [n, m]. The difference is known here and in
`SubnetConv1D`, and nowhere else.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

_UNQUANTIZED = "Load the model unquantized"


class BlockAccess(Protocol):
    """The part of `sharding.interface.ParameterAccess` that subnets are cut with; indices follow the stored order."""

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter as it is stored: (m, n) or (n, m)."""
        ...

    def read_block(self, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """weight[rows][:, columns], [r, c] as stored, in the weight's dtype, on every rank; called by all of them."""
        ...

    def write_block(self, weight: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """weight[rows][:, columns] = values; called by all ranks."""
        ...


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear` or a `Conv1D`, subclasses included, whether or not it can hold a subnet (`why_unusable`)."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def stores_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [n, m], input neurons first."""
    return _is_conv1d(module) or bool(getattr(module, "weight_is_transposed", False))


class Unusable(NamedTuple):
    """Why a layer cannot hold a subnet, as the end of a sentence ("it ..."), and what to do about it ("" if nothing)."""

    reason: str
    fix: str


def why_unusable(module: Any) -> Unusable | None:
    """Why a linear layer cannot hold a subnet, or None if it can."""
    plain = nn.Linear if isinstance(module, nn.Linear) else _conv1d_class()
    if type(module).forward is not getattr(plain, "forward", None):
        return Unusable(
            f"computes by a forward of its own ({type(module).__name__})", _UNQUANTIZED if _holds_packed(module) else ""
        )
    if "forward" in vars(module):
        return Unusable(
            "has its forward replaced on the object (device_map and offloading hooks do that)",
            "Load the model without device_map",
        )
    if "weight" not in module._parameters:
        return Unusable(
            "computes its weight from other tensors (a parametrization, or packed parts)", "Remove the parametrization first"
        )
    if _is_packed(module.weight):
        kind = _foreign_kind(module.weight) or str(module.weight.dtype)
        return Unusable(f"has a quantized weight ({kind})", _UNQUANTIZED)
    return None


def is_quantized_substitute(module: Any) -> bool:
    """Whether a module stands where a linear layer was and holds its weight in packed form (GPTQ, AWQ, HQQ and others).

    Such modules are no `nn.Linear`; they are known by in_features and out_features beside whole-number tensors.
    """
    if is_linear(module) or not any(hasattr(module, name) for name in ("in_features", "infeatures")):
        return False
    return _holds_packed(module)


def _holds_packed(module: nn.Module) -> bool:
    return any(_is_packed(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)])


def _is_packed(tensor: Tensor) -> bool:
    """Whole numbers, or floating point of one byte or less: nothing to read single weights from."""
    return not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or _foreign_kind(tensor) is not None


def _foreign_kind(weight: Tensor) -> str | None:
    """Name of the class of a tensor that stores something else than its values (torchao's, quanto's, bitsandbytes'), or None.

    DTensor shards and fake tensors are known; a DTensor is judged by what it holds.
    """
    kind: Any = type(getattr(weight, "_local_tensor", weight))
    plain = kind.__torch_dispatch__ in (Tensor.__torch_dispatch__, nn.Parameter.__torch_dispatch__)
    known = kind.__name__ in ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor")
    return None if known or (plain and not hasattr(weight, "quant_state")) else kind.__name__


def whole_shape(access: BlockAccess, site: Any) -> tuple[int, int]:
    """(m, n) of a linear layer's whole weight, however it is stored or sharded."""
    first, second = access.shape(site.weight)
    return (second, first) if stores_transposed(site) else (first, second)


def read_subnet(access: BlockAccess, site: Any, rows: Tensor, columns: Tensor) -> Tensor:
    """W[R][:, C] of a linear layer, [r, c] contiguous in the weight's dtype, on every rank; called by all of them."""
    if stores_transposed(site):
        return access.read_block(site.weight, columns, rows).t().contiguous()
    return access.read_block(site.weight, rows, columns)


def write_back(access: BlockAccess, site: Any, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """W[R][:, C] = values [r, c], into whatever part of the weight each rank keeps; called by all ranks."""
    if stores_transposed(site):
        access.write_block(site.weight, columns, rows, values.t().contiguous())
    else:
        access.write_block(site.weight, rows, columns, values)


def _is_conv1d(module: nn.Module) -> bool:
    kind = _conv1d_class()
    return kind is not None and isinstance(module, kind)


def _conv1d_class() -> type | None:
    # A model that has such layers has loaded the module that defines them; nothing is imported for those that have not.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
