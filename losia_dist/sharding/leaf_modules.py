"""ZeRO-3's leaf modules around subnets: which of them train, and the others refused before their first backward.

DeepSpeed reduces all gradients of a leaf module at once, in a full backward hook. torch calls such a hook once the gradients
of the module's positional inputs are there, and already before the module's own backward where none of those needs a
gradient: then DeepSpeed takes zeros of the wrong size for gradients that are still to come, and the backward dies.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import get_z3_leaf_modules
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from losia_dist.errors import UnsupportedError
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.listed_experts import listed_blocks


def refuse_leaf_modules(model: nn.Module) -> None:
    """Look at the leaf modules that hold subnets, and watch each of them in its first forward with gradients, however they were
    chosen ("leaf_module", "stage3_module_granularity_threshold", `set_z3_leaf_modules`). Same on every rank; no communication.

    Raises:
        UnsupportedError: the leaf module holds the first thing that trains, so that no input of it can need a gradient; in the
            first forward, from the module: no positional input of it needs one (Llama's attention gets names only).
    """
    names = {module: name for name, module in model.named_modules()}
    leaves = [module for module in get_z3_leaf_modules(model) if find_sites(module)]
    first = next((p for p in model.parameters() if p.requires_grad), None)  # in the order that the model runs in
    makes_inputs_train = getattr(model, "_require_grads_hook", None) is not None  # enable_input_require_grads
    for leaf in leaves:
        if not makes_inputs_train and any(parameter is first for parameter in leaf.parameters()):
            raise UnsupportedError(_message(names[leaf], leaf))
        _watch_first_forward(names[leaf], leaf)


def refuse_listed_experts(model: nn.Module) -> None:
    """Experts that are modules of their own are gathered where a token reaches them; other ranks would wait.

    Raises:
        UnsupportedError: their block is no leaf module, and is not inside one. Same on every rank; no communication.
    """
    leaves = {id(module) for leaf in get_z3_leaf_modules(model) for module in leaf.modules()}
    for name, block in listed_blocks(model).items():
        if id(block) not in leaves:
            raise UnsupportedError(
                f"{name} ({type(block).__name__}) holds experts as modules of their own, which ZeRO-3 gathers one by one, on "
                "the ranks that have a token for them: the others would wait. Make the block a leaf module before the engine "
                f"is made (deepspeed.utils.set_z3_leaf_modules(model, [{type(block).__name__}])), or use DDP or FSDP2."
            )


def refuse_listed_in_buckets(model: nn.Module) -> None:
    """Experts that are modules of their own come to an end in another order on each rank, and ZeRO-2 reduces gradients in the
    order in which they come: one expert's with another's (findings/zero2_reduces_by_arrival.sh).

    Raises:
        UnsupportedError: same on every rank; no communication.
    """
    for name, block in listed_blocks(model).items():
        raise UnsupportedError(
            f"{name} ({type(block).__name__}) holds experts as modules of their own: ZeRO-2 reduces gradients in the order in "
            "which they come, which differs between ranks, and would mix experts. Use DDP, ZeRO-1, FSDP2, or ZeRO-3 with the "
            f"block as a leaf module (deepspeed.utils.set_z3_leaf_modules(model, [{type(block).__name__}]))."
        )


def _watch_first_forward(name: str, leaf: nn.Module) -> None:
    def look(module: nn.Module, positional: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation, or the first pass of reentrant checkpointing
        handle.remove()
        if not any(isinstance(item, Tensor) and item.requires_grad for item in tree_iter(positional)):
            raise UnsupportedError(_message(name, module))

    handle = leaf.register_forward_pre_hook(look)


def _message(name: str, leaf: nn.Module) -> str:
    return (
        f"{name or 'the model'} ({type(leaf).__name__}) is a ZeRO-3 leaf module with subnets, and no positional input of it "
        "needs a gradient: DeepSpeed would reduce its gradients before they are computed, and the backward would fail. Leave "
        'it out of "leaf_module", set_z3_leaf_modules and stage3_module_granularity_threshold, or choose smaller modules '
        "that come after a trained layer (the MLP of a decoder layer works)."
    )
