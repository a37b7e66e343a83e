"""`Site`: the place in a model where a subnet lives. Everything beyond `subnet/` speaks of sites, and of no modules.

A linear layer has one; a module of experts has one for each of its weights, or several, each for a part of the experts. The
module holds the tensors, under the names that engines and checkpoints know; the site knows these names, and what else is known
of the place. Copies, the autograd Functions and the operators of `torch.compile` work on sites.

Shapes: a linear layer's subnet is S [r, c] with rows [r] and columns [c]; that of X experts is S [X, r, c] with rows [X, r]
and columns [X, c]: a subnet of each, all of one size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losia_dist.subnet.blocks import take_last, write_subnet
from losia_dist.subnet.layout import ONE_MATRIX, Layout
from losia_dist.subnet.packed import packed_of

# Called in backward with the full gradient of this micro-batch and the whole weight: [m, n] both, or [X, m, n] of experts. A
# sink with `one_at_a_time` gets each expert's [m, n] by itself, and its place among the X.
GradientSink = Callable[..., None]
# Called in forward with the tokens [t, n] that enter; of experts with those of each expert, and its place.
InputSink = Callable[[Tensor, int], None]
_OF_THE_RUN = (
    "gradient_sink",
    "gradient_witness",
    "input_sink",
    "kept_inputs",
    "tokens",
    "take_columns",
)  # what collects for the run that a copy is made from


class TensorNames(NamedTuple):
    """What a module calls a site's tensors."""

    weight: str = "weight"
    subnet: str = "subnet"
    row_index: str = "row_index"
    col_index: str = "col_index"


LINEAR = TensorNames()  # of a linear layer


def matrix_names(name: str, layout: Layout) -> list[str]:
    """What each matrix of a weight is called where subnets are drawn: the layer, or "<weight>.<expert>"."""
    return [name] if layout.experts is None else [f"{name}.{expert}" for expert in range(*layout.experts)]


class Site:
    """A weight W [m, n] (or several, of experts) of which W[R][:, C] alone trains, and all that is known of it.

    Args:
        module: that holds the tensors.
        name: full name of the layer in the model that was converted; of experts, of the weight (and the part).
        group_name: the decoder layer (or the output layer, or the part of its experts) it is re-localized with.
        is_output: whether it is the output layer's.
        shape: (m, n) of one whole matrix, given apart because a sharded weight reads as empty.
        layout: how the weight stores its matrices.
        asked_dtype: what the subnet was asked to be kept in, whatever the engine casts; None: the weight's.
        names: of its tensors.
        weight_name: full name of the layer or the weight without the part.
        part: place of the part among those of the weight; -1: it is all.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        group_name: str,
        is_output: bool,
        shape: tuple[int, int],
        layout: Layout = ONE_MATRIX,
        asked_dtype: torch.dtype | None = None,
        names: TensorNames = LINEAR,
        weight_name: str | None = None,
        part: int = -1,
    ) -> None:
        self.module, self.names, self.layout = module, names, layout
        self.name, self.group_name, self.is_output = name, group_name, is_output
        self.shape, self.asked_dtype, self.part = shape, asked_dtype, part
        self.packed = packed_of(module, names.weight)  # what a quantized weight stores; None: the weight holds its values
        self.in_float8 = False  # y and dx are products in FP8 (`subnet.float8`)
        self.takes_all_rows = self.row_index.shape[-1] == shape[0]
        self.takes_all_columns = self.col_index.shape[-1] == shape[1]
        self.matrix_names = matrix_names(weight_name or name, layout)
        # Experts [start, stop) of the weight that this rank computes with, where they are spread over ranks; None: with all.
        self.held: tuple[int, int] | None = None
        self.awaits_weights = self.subnet.is_meta  # converted on the meta device: the subnet is cut once the weights are there
        self.converted_print: Tensor  # int64 scalar of the subnet's first values, to tell ranks that loaded different weights
        # True once an access object has established that the engine never re-gathers the weight between forward and
        # backward; until then backward writes the subnet again, which is always right.
        self.weight_is_resident = False
        self.written: tuple[int, int] | None = (
            None  # versions of weight and subnet when the one was last written into the other
        )
        self.gradient_sink: GradientSink | None = None  # set while the group localizes
        # (site, x) -> x[..., C], where other layers may have taken the same of the same x (`shared_inputs`).
        self.take_columns: Callable[[Site, Tensor], Tensor] | None = None
        self.input_sink: InputSink | None = None  # set while the inputs' sizes are measured
        self.kept_inputs: dict[int, Tensor] = {}  # under torch.compile: inputs of this step that await their backward
        self.gradient_witness: Callable[[Tensor], None] | None = None  # set until the subnet was seen to train
        self.converted_with = {name: shape}  # of all sites that the model was converted with: name -> (m, n)
        self.is_tiled = False  # one forward calls the layer several times, and backward again, for parts of the tokens
        self.shares_embedding = False  # the input embedding has the same weight, and looks up in it (TiedSubnetEmbedding)
        # Of a deep copy that no conductor drives: version and print of the subnet it was made with.
        self.copied: tuple[int, int] | None = None
        self.tokens: Tensor | None = None  # int64 [X]: tokens that reached each expert in training since they were counted last
        self.in_mid_step = False  # a backward formed the subnet's gradient since the last optimizer step ended

    @property
    def weight(self) -> nn.Parameter:
        """W [m, n] as it is stored (`Layout`), frozen. Holds the subnet's present values only while the module runs;
        `LoSiA.consolidate` writes them for good."""
        return getattr(self.module, self.names.weight)  # type: ignore[no-any-return]

    @property
    def subnet(self) -> nn.Parameter:
        """S [r, c] or [X, r, c], trainable, an ordinary parameter that any engine reduces, clips, shards and saves."""
        return getattr(self.module, self.names.subnet)  # type: ignore[no-any-return]

    @property
    def row_index(self) -> Tensor:
        """int64 buffer [r] or [X, r], sorted ascending: output neurons of the subnet."""
        return getattr(self.module, self.names.row_index)  # type: ignore[no-any-return]

    @property
    def col_index(self) -> Tensor:
        """int64 buffer [c] or [X, c], sorted ascending: input neurons of the subnet."""
        return getattr(self.module, self.names.col_index)  # type: ignore[no-any-return]

    @property
    def rows(self) -> Tensor | None:
        """Row index int64 [r] or [X, r], or None where all rows belong to the subnet (then nothing need be gathered)."""
        return None if self.takes_all_rows else self.row_index

    @property
    def columns(self) -> Tensor | None:
        """Column index int64 [c] or [X, c], or None where all columns belong to the subnet."""
        return None if self.takes_all_columns else self.col_index

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer's, not of experts."""
        return self.layout.experts is None

    @property
    def subnet_shape(self) -> tuple[int, int]:
        """(r, c) of the subnet of one matrix."""
        return self.row_index.shape[-1], self.col_index.shape[-1]

    @property
    def subnet_size(self) -> int:
        """Values that train, of all matrices: r c, or X r c."""
        return self.layout.count * self.row_index.shape[-1] * self.col_index.shape[-1]

    @property
    def size(self) -> int:
        """Values of all whole matrices: m n, or X m n."""
        return self.layout.count * self.shape[0] * self.shape[1]

    @property
    def experts(self) -> tuple[int, int] | None:
        """The experts [start, stop) of the weight that the subnets are in; None of a linear layer."""
        return self.layout.experts

    @property
    def here(self) -> Layout:
        """How the weight and the subnet that this rank computes with store their matrices: of the experts that it holds."""
        return self.layout if self.held is None else replace(self.layout, experts=(0, self.held[1] - self.held[0]))

    @property
    def first_here(self) -> int:
        """Place among the X matrices of the first one that this rank computes with."""
        return 0 if self.held is None else self.held[0]

    def index_here(self, index: Tensor) -> Tensor:
        """A row or column index [X, k], of the matrices that this rank computes with."""
        return index if self.held is None else index[self.held[0] : self.held[1]]

    @property
    def weight_is_transposed(self) -> bool:
        """Whether each matrix is stored [n, m]."""
        return self.layout.transposed

    def as_rows(self, weight: Tensor) -> Tensor:
        """The matrices of the whole weight with output neurons first, [m, n] or [X, m, n]: itself, or a view."""
        return self.layout.matrices(weight)

    def columns_of(self, x: Tensor) -> Tensor:
        """x[..., C] of a linear layer's input x [..., n], contiguous; x itself where all columns belong to the subnet."""
        return take_last(x, self.columns) if self.take_columns is None else self.take_columns(self, x)

    def present(self, weight: Tensor, subnet: Tensor, dtype: torch.dtype, *, again: bool) -> Tensor:
        """The matrices with the subnet's present values, output neurons first: [m, n] or [X, m, n].

        The weight's own memory, in its dtype; of a quantized weight a new tensor of `dtype`.

        Args:
            weight, subnet: whole, as they are stored.
            again: backward asks, after forward did.
        """
        if self.packed is not None:
            values = self.packed.dense(weight, dtype)
            self.write_into(values, subnet)
            return self.as_rows(values)
        matrix = self.as_rows(weight)
        if not self.weight_is_resident if again else self.must_write(weight, subnet):
            write_subnet(matrix, subnet, self.rows, self.columns)
        return matrix

    def write_into(self, weight: Tensor, subnet: Tensor) -> None:
        """Write a subnet, whole and of any dtype, into a whole weight as it is stored: in place and unseen by autograd."""
        if self.layout.experts is None:
            write_subnet(self.as_rows(weight), subnet, self.rows, self.columns)
            return
        rows, columns = self.index_here(self.row_index), self.index_here(self.col_index)
        places = self.here.places(tuple(weight.shape), rows, columns)
        weight.data.index_put_(places, subnet.data.to(weight.dtype))

    def must_write(self, weight: Tensor, subnet: Tensor) -> bool:
        """Whether the weight may lack the subnet's present values; the caller then writes them.

        weight and subnet: whole, as they are stored, of any dtype. No value is read, so that no device is waited for.

        Where the engine keeps the weight, once per optimizer step is enough: further micro-batches find it written. Versions
        show what was changed in place since, and `note_change` tells of the rest (ZeRO updates memory behind a parameter).
        Evaluation always writes, for weights that were swapped through `.data`, as averages of weights often are.
        """
        if not self.weight_is_resident:
            return True
        versions, training = (weight._version, subnet._version), self.module.training
        known = training and self.written == versions
        self.written = versions if training else None
        return not known

    def note_change(self) -> None:
        """An optimizer step ended: the subnet or its place may have changed in a way that no version shows."""
        self.written = None
        self.in_mid_step = False
        self.kept_inputs.clear()  # of forward passes that had no backward, or a recomputed one

    def see_tokens(self, counts: Tensor) -> None:
        """Tokens that one forward sent to each expert that this rank computes with: int64 [E]. The host does not wait."""
        start, stop = self.here.experts or (0, 0)
        self.tokens = counts[start:stop] if self.tokens is None else self.tokens + counts[start:stop]

    def count_tokens(self) -> Tensor:
        """int64 [X]: tokens that reached each expert on this rank since the last call; counting begins anew."""
        found = self.row_index.new_zeros(self.layout.count)
        if self.tokens is not None:
            found[self.first_here : self.first_here + self.tokens.numel()] = self.tokens
        self.tokens = None
        return found

    def copy_for(self, module: nn.Module, memo: dict[int, Any]) -> Site:
        """The site of a deep copy of its module: no conductor drives it, and it collects nothing."""
        made = Site.__new__(Site)
        memo[id(self)] = made
        kept = {name: value for name, value in self.__dict__.items() if name not in (*_OF_THE_RUN, "module")}
        made.__dict__.update(copy.deepcopy(kept, memo))
        made.module, made.kept_inputs = module, {}
        made.gradient_sink = made.gradient_witness = made.input_sink = made.tokens = made.take_columns = None
        made.written, made.in_mid_step = None, False
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        copy.deepcopy(self.module, memo)
        return memo[id(self)]  # type: ignore[no-any-return]
