"""`SubnetLinear`: an `nn.Linear` whose weight is frozen and whose subnet is an ordinary small parameter."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.ranks.fingerprint import loading_print
from losia_dist.subnet.autocast import autocast_dtype
from losia_dist.subnet.copied import HoldsSites, check_copy
from losia_dist.subnet.function import SubnetLinearFunction, TiedEmbeddingFunction, subnet_forward
from losia_dist.subnet.kinds import stores_transposed
from losia_dist.subnet.layout import Layout
from losia_dist.subnet.operator import compiled_embedding, compiled_linear
from losia_dist.subnet.packed_linear import PackedLinear
from losia_dist.subnet.site import Site


class SubnetLinear(HoldsSites, nn.Linear):
    """A linear layer that trains W[R][:, C] only.

    Made from an existing `nn.Linear` in place (`SubnetLinear.adopt`), so that the module keeps its name, its hooks and
    its `weight`. Its tensors are described in `Site`.
    """

    weight_is_transposed = False

    subnet: nn.Parameter
    row_index: Tensor
    col_index: Tensor

    @classmethod
    def adopt(
        cls,
        linear: Any,
        *,
        name: str,
        group_name: str,
        is_output: bool,
        shape: tuple[int, int],
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        asked_dtype: torch.dtype | None = None,
    ) -> Site:
        """Turn `linear` (an `nn.Linear`, or a `Conv1D` of Transformers) into a SubnetLinear in place and return its site.

        shape is the whole weight's (m, n), given apart because a sharded weight reads as empty; rows int64 [r] and columns
        int64 [c] sorted; values [r, c], the weight's at those places, become the subnet's parameter.
        """
        linear.__class__ = _subnet_class(linear)
        assert isinstance(linear, cls)
        linear.out_features, linear.in_features = shape  # Conv1D knows them by other names
        linear.weight.requires_grad_(False)
        linear.subnet = nn.Parameter(values)
        linear.register_buffer("row_index", rows)
        linear.register_buffer("col_index", columns)
        site = Site(
            linear,
            name=name,
            group_name=group_name,
            is_output=is_output,
            shape=shape,
            layout=Layout(transposed=linear.weight_is_transposed),
            asked_dtype=asked_dtype,
        )
        linear.sites = [site]
        site.converted_print = loading_print(values)
        return site

    @property
    def site(self) -> Site:
        """A linear layer has one."""
        return self.sites[0]

    def forward(self, input: Tensor) -> Tensor:
        """y = x W^T + b for x [..., n]; under autocast in the autocast dtype, as a dense layer would be."""
        device = input.device.type
        dtype = autocast_dtype(device, self.subnet.requires_grad)
        if dtype is None:
            return self._compute(input)
        with torch.autocast(device, enabled=False):
            return self._compute(input.to(dtype))

    def _compute(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled_linear(self, x)
        if self.site.copied is not None:
            check_copy(self.site)
        if not torch.is_grad_enabled():  # nothing is kept
            return subnet_forward(self.site, x, self.weight, self.bias, self.subnet)
        return SubnetLinearFunction.apply(x, self.weight, self.bias, self.subnet, self.site)

    def extra_repr(self) -> str:
        rows, columns = self.row_index.numel(), self.col_index.numel()
        return f"{super().extra_repr()}, subnet={rows}x{columns}"


class SubnetConv1D(SubnetLinear):
    """A SubnetLinear whose weight is stored [n, m], as Transformers' `Conv1D` (GPT-2) does.

    Rows are output neurons and columns input neurons here too: `subnet` is [r, c], and only `weight` is the other way round.
    """

    weight_is_transposed = True


def _subnet_class(module: nn.Module) -> type[SubnetLinear]:
    if stores_transposed(module):
        return SubnetConv1D
    kind: Any = type(module)
    return SubnetLinear if kind in (nn.Linear, PackedLinear) else _with_methods_of(kind)


@cache
def _with_methods_of(kind: type[Any]) -> type[SubnetLinear]:
    """For a subclass that computes as nn.Linear does: it keeps its other methods."""
    return type(f"Subnet{kind.__name__}", (SubnetLinear, kind), {})


class TiedSubnetEmbedding(nn.Embedding):
    """The input embedding of a model whose output layer shares its weight and trains a subnet of its rows.

    The look-up sees the trained rows, and its gradient joins that of the output layer: the subnet's gradient is the one
    dense training would give the shared weight.
    """

    subnet: nn.Parameter

    @classmethod
    def adopt(cls, embedding: nn.Embedding, head: SubnetLinear) -> TiedSubnetEmbedding:
        """Turn `embedding` in place into one that shares the head's subnet.

        A subclass with a forward of its own must call nn.Embedding's (`can_share_subnet`): that call is what changes here.
        """
        kind = type(embedding)
        # Between the subclass and nn.Embedding, so that the subclass's scaling stays.
        embedding.__class__ = cls if kind is nn.Embedding else type(f"TiedSubnet{kind.__name__}", (kind, cls), {})
        assert isinstance(embedding, cls)
        head.site.shares_embedding = True
        embedding.subnet = head.subnet  # registered here too, so that a sharded engine gathers it for this module
        embedding.__dict__["head"] = head  # not a submodule: the model's tree stays as it was
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        head: SubnetLinear = self.__dict__["head"]
        if torch.compiler.is_compiling():
            return compiled_embedding(head, input, self.weight, self.subnet, self.padding_idx)
        return TiedEmbeddingFunction.apply(input, self.weight, self.subnet, head.site, self.padding_idx)


def can_share_subnet(module: nn.Module) -> bool:
    """Whether an embedding looks tokens up by nn.Embedding's forward, its own subclass's scaling aside."""
    if not isinstance(module, nn.Embedding) or "forward" in vars(module):
        return False
    forward = inspect.unwrap(type(module).forward)
    return forward is nn.Embedding.forward or "super" in forward.__code__.co_names
