"""Which modules are linear layers, and which of them can hold a subnet.

`nn.Linear` and Transformers' `Conv1D` (GPT-2), which computes the same layer and stores its weight the other way round.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from losia_dist.subnet.packed import packed_of

_UNQUANTIZED = "Load the model unquantized"


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
    if packed_of(module) is not None:
        return None
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
    if is_packed(module.weight):
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
    return any(is_packed(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)])


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor holds a weight in packed form: whole numbers, or floating point of one byte or less: nothing to read
    single weights from.
    """
    return not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or _foreign_kind(tensor) is not None


def _foreign_kind(weight: Tensor) -> str | None:
    """Name of the class of a tensor that stores something else than its values (torchao's, quanto's, bitsandbytes'), or None.

    DTensor shards and fake tensors are known; a DTensor is judged by what it holds.
    """
    kind: Any = type(getattr(weight, "_local_tensor", weight))
    plain = kind.__torch_dispatch__ in (Tensor.__torch_dispatch__, nn.Parameter.__torch_dispatch__)
    known = kind.__name__ in ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor")
    return None if known or (plain and not hasattr(weight, "quant_state")) else kind.__name__


def _is_conv1d(module: nn.Module) -> bool:
    kind = _conv1d_class()
    return kind is not None and isinstance(module, kind)


def _conv1d_class() -> type | None:
    # A model that has such layers has loaded the module that defines them; nothing is imported for those that have not.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
