"""What re-localization, saving and export need from an engine: two small interfaces, composed and not inherited.

Every method is called on all ranks, with the same arguments, in the same order.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from losia_dist.subnet.differences import Shares
from losia_dist.subnet.layout import Places


class ParameterAccess(Protocol):
    """Reads and writes parts of parameters wherever the engine keeps them."""

    weight_is_resident: bool  # a weight stays whole in memory between forward and backward, and between steps

    def reshard(self) -> None:
        """Leave no parameter gathered: all are where the other methods, and the optimizer, look for them. Called first, between
        steps."""
        ...

    def without_reduction(self) -> AbstractContextManager[None]:
        """While it is open a backward pass that gives no parameter a gradient reduces none."""
        ...

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the whole parameter as it is stored: a subnet's (r, c) or (X, r, c), a weight's (m, n), (n, m) or (E, m,
        n). No communication.
        """
        ...

    def read_block(self, weight: Tensor, places: Places) -> Tensor:
        """weight[places] (`Layout.places`), a subnet's [r, c] or [X, r, c], in the weight's dtype, on every rank."""
        ...

    def write_block(self, weight: Tensor, places: Places, values: Tensor) -> None:
        """weight[places] = values [r, c] or [X, r, c], cast to the weight's dtype; each rank writes what it keeps."""
        ...

    def read_bits(self, weight: Tensor, places: Places) -> Tensor:
        """The bits of the stored elements in these places, an int64 number each, on every rank: what a quantized weight's codes
        are read by. The lowest bits of a number are the element's."""
        ...

    def write_bits(self, weight: Tensor, places: Places, bits: Tensor) -> None:
        """Set the bits of stored elements; int64, equal on every rank. Each rank writes what it keeps."""
        ...

    def shares(self, parameter: Tensor) -> Shares | None:
        """The ranks that keep parts of a parameter; None: each keeps all of it. No communication."""
        ...

    def dtype(self, parameter: Tensor) -> torch.dtype:
        """Of a parameter's values: its own, unless it is a quantized weight."""
        ...

    def read_whole(self, parameter: Tensor) -> Tensor:
        """A whole parameter, of `shape` and in its dtype, on every rank. For subnets, and one at a time for export."""
        ...

    def write_whole(self, parameter: Tensor, values: Tensor) -> None:
        """Replace a whole parameter in the engine's model copy; masters are `StateAccess`'s. values: of `shape`, on any device,
        equal on every rank; cast to the parameter's dtype."""
        ...


class StateAccess(Protocol):
    """Reads and writes the optimizer's side of the subnets."""

    optimizer: Optimizer  # the one that holds the state and whose step the engine calls
    # The parameters of one optimizer group share their scalars (ZeRO flattens them into one vector with one step count).
    one_scalar_per_group: bool

    def write_master(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set the values that the optimizer updates. values: fp32 in the parameter's whole shape (a subnet's [r, c]), equal on
        every rank."""
        ...

    def master_fragment(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part of the values the optimizer updates, a view, or None if it keeps none: [r, c], rows of it
        [<= r, c], or flat [k], maybe with padding behind; fp32, or the parameter's dtype without masters. No communication."""
        ...

    def stepped(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """This rank's part of the values that the optimizer's step changes, and of the model's copy that the step then writes
        from them: two views of the same places and shape ([r, c], rows of it, or flat [k] without padding), each in its own
        dtype, or None if it keeps none. Found as the engine's own step finds them and by no bookkeeping that the other
        methods use: `run.masters` compares the two. No communication."""
        ...

    def without_padding(self, gradient: Tensor, parameter: Tensor) -> list[Tensor]:
        """Parts of this rank's gradient of one of the optimizer's own parameters, or of any vector like it, that stand for
        elements of the model: views. The engine may leave anything in what it pads. No communication."""
        ...

    def read_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimizer keeps for a parameter, whole and on every rank: for checkpoints.

        "value" holds what the optimizer updates (the fp32 master, or the parameter itself), the parameter's shape; the other
        names are the optimizer's own ("exp_avg", ...): whole tensors, and scalars [] (a whole number as int64).
        """
        ...

    def write_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Put back what `read_state` gave, on any engine; what it does not name is cleared. The engine's model copy of the
        parameter is `ParameterAccess.write_whole`'s. state: whole tensors ("value" and a subnet's moments [r, c]) and
        scalars [], on any device, equal on every rank."""
        ...

    def clear(self, group_name: str, restart_bias_correction: bool) -> None:
        """Zero the moments of a group; with `restart_bias_correction` its step counts too."""
        ...

    def state_tensors(self) -> list[Tensor]:
        """Every tensor of optimizer state but scalars, and every master copy, that this rank holds, as it holds them: whole,
        rows, or flat [k]; in their own dtypes. No communication."""
        ...
