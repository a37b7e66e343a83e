"""`SubnetLayer`: what a layer with a subnet holds, and what is known of it. `linear` makes it compute.

Copies, the autograd Function and the operators of `torch.compile` work on these attributes alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Called in backward with the full gradient [m, n] of this micro-batch and the whole weight [m, n].
GradientSink = Callable[[Tensor, Tensor], None]


class SubnetLayer(nn.Linear):
    """The state of a linear layer of which W[R][:, C] alone trains.

    Attributes:
        weight: [m, n] ([n, m] in `SubnetConv1D`), frozen. Holds the subnet's present values only while the module runs;
            `LoSiA.consolidate` writes them for good.
        subnet: [r, c], trainable, an ordinary `nn.Parameter` that any engine reduces, clips, shards and saves.
        row_index, col_index: int64 buffers [r] and [c], sorted ascending: output and input neurons of the subnet.
    """

    weight_is_transposed = False

    subnet: nn.Parameter
    row_index: Tensor
    col_index: Tensor

    name: str  # full name in the model that was converted
    group_name: str  # the decoder layer (or the output layer) it is re-localized with
    is_output: bool
    takes_all_rows: bool
    takes_all_columns: bool
    asked_dtype: torch.dtype | None  # what the subnet was asked to be kept in, whatever the engine casts
    awaits_weights: bool  # converted on the meta device: the subnet is cut once the weights are there
    converted_print: Tensor  # int64 scalar of the subnet's first values, to tell ranks that loaded different weights
    # True once an access object has established that the engine never re-gathers the weight between forward and
    # backward; until then backward writes the subnet again, which is always right.
    weight_is_resident: bool
    written: tuple[int, int] | None  # versions of weight and subnet when the one was last written into the other
    gradient_sink: GradientSink | None  # set while the group localizes
    kept_inputs: dict[int, Tensor]  # under torch.compile: inputs of this step that await their backward, while it localizes
    gradient_witness: Callable[[Tensor], None] | None  # set until the subnet was seen to train
    converted_with: dict[str, tuple[int, int]]  # of all layers that the model was converted with: name -> (m, n)
    shares_embedding: bool  # the input embedding has the same weight, and looks up in it (TiedSubnetEmbedding)
    copied: tuple[int, int] | None  # of a deep copy that no conductor drives: version and print of the subnet it was made with
    in_mid_step: bool  # a backward formed the subnet's gradient since the last optimizer step ended

    @property
    def rows(self) -> Tensor | None:
        """Row index, or None where all rows belong to the subnet (then nothing need be gathered)."""
        return None if self.takes_all_rows else self.row_index

    @property
    def columns(self) -> Tensor | None:
        """Column index, or None where all columns belong to the subnet."""
        return None if self.takes_all_columns else self.col_index

    def as_rows(self, weight: Tensor) -> Tensor:
        """The whole weight as [m, n], output neurons first: itself, or a view."""
        return weight.t() if self.weight_is_transposed else weight

    def must_write(self, weight: Tensor, subnet: Tensor) -> bool:
        """Whether the weight may lack the subnet's present values; the caller then writes them.

        Where the engine keeps the weight, once per optimizer step is enough: further micro-batches find it written. Versions
        show what was changed in place since, and `note_change` tells of the rest (ZeRO updates memory behind a parameter).
        Evaluation always writes, for weights that were swapped through `.data`, as averages of weights often are.
        """
        if not self.weight_is_resident:
            return True
        versions = (weight._version, subnet._version)
        known = self.training and self.written == versions
        self.written = versions if self.training else None
        return not known

    def note_change(self) -> None:
        """An optimizer step ended: the subnet or its place may have changed in a way that no version shows."""
        self.written = None
        self.in_mid_step = False
        self.kept_inputs.clear()  # of forward passes that had no backward, or a recomputed one
