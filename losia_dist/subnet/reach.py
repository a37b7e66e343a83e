"""Which linear layers a training loss gives no gradient, seen by how the model is built: nothing is run.

A subnet there would never change, and the run would end after its first step. What tells: a forward under
`torch.no_grad`, an indexer (it returns positions, which have no gradient), a parent that reads the weight instead of
calling the layer, attention to an encoder that is not there, a pooler beside an output layer, a tower for pictures or sound.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SENSES = ("vision", "image", "video", "audio", "speech", "protein")
_TO_ENCODER = {"encoder_attn", "cross_attn", "crossattention", "cross_attention"}


@dataclass(frozen=True)
class Unreached:
    """Why a layer gets no gradient, as the end of a sentence ("it ..."), and whether that holds for every input."""

    reason: str
    always: bool


def unreached(model: nn.Module, linears: Iterable[str]) -> dict[str, Unreached]:
    """The layers, out of full names of linear ones, that the loss of a text does not reach."""
    modules = dict(model.named_modules())
    blocks = {name: why for name, module in modules.items() if (why := _why_block(model, name, module)) is not None}
    for tower in _towers(model, modules):
        blocks[tower] = Unreached("reads other things than text, and stays frozen unless named", always=False)
    reads: dict[type, tuple[frozenset[str], frozenset[str]]] = {}
    found = {}
    for name in linears:
        parents = [".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 2)]
        why = next((blocks[parent] for parent in parents if parent in blocks), None)
        if why is None and "." in name:
            place, _, attribute = name.rpartition(".")
            parent = type(modules[place])
            if parent not in reads:
                reads[parent] = _weights_read(parent)
            why = _why_read(model, parent, attribute, *reads[parent])
        if why is not None:
            found[name] = why
    return found


def _why_block(model: Any, name: str, module: nn.Module) -> Unreached | None:
    own = name.rpartition(".")[2].lower()
    kind = type(module).__name__.lower()
    if _without_gradients(type(module).forward):
        return Unreached(f"runs without gradients ({type(module).__name__}.forward is under torch.no_grad)", always=True)
    if own == "indexer" or kind.endswith("indexer"):
        return Unreached(f"chooses tokens by their positions, which have no gradient ({type(module).__name__})", always=True)
    if (own in _TO_ENCODER or "crossattention" in kind) and _stands_alone(model):
        return Unreached("attends to another model's output, and this one stands alone", always=False)
    if own == "pooler" and _output_layer(model) is not None:
        return Unreached("pools for a classifier, and this model has an output layer instead", always=False)
    return None


def _without_gradients(forward: Any) -> bool:
    """Whether a function was decorated with `torch.no_grad()` or `torch.inference_mode()`, at any depth."""
    while forward is not None:
        for cell in getattr(forward, "__closure__", None) or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(getattr(held, "__self__", held), torch.no_grad | torch.inference_mode):
                return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _stands_alone(model: Any) -> bool:
    """A decoder of one part, which nobody hands an encoder's output."""
    config = getattr(model, "config", None)
    text_config: Any = getattr(config, "get_text_config", None)
    if text_config is None or getattr(config, "is_encoder_decoder", False):
        return False
    try:
        return text_config() is config
    except ValueError:  # several parts
        return False


def _output_layer(model: Any) -> Any:
    get_output = getattr(model, "get_output_embeddings", None)
    return get_output() if callable(get_output) else None


def _towers(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Parts inside a language model's own body that hold a model of another kind (Phi-4-multimodal keeps them there)."""
    config = getattr(model, "config", None)
    keys = [key for key in getattr(config, "sub_configs", None) or {} if any(sense in key for sense in _SENSES)]
    kinds = {type(getattr(config, key, None)) for key in keys} - {type(None), type(config)}
    if not kinds or not _stands_alone(model):
        return []
    base = getattr(model, "base_model", None)
    depth = next((name.count(".") + 1 for name, module in modules.items() if module is base and name), 0) + 1
    inner = [
        name
        for name, module in modules.items()
        if name and hasattr(module, "base_model_prefix") and type(getattr(module, "config", None)) in kinds
    ]
    return list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in inner))


def _why_read(model: Any, parent: type, attribute: str, used: frozenset[str], handed: frozenset[str]) -> Unreached | None:
    if attribute in used:
        return Unreached(f"has its weight read by {parent.__name__} itself, past the layer", always=True)
    if attribute in handed and (importlib.util.find_spec("mamba_ssm") or getattr(model, "use_kernels", False)):
        return Unreached(f"has its weight handed to a fused kernel by {parent.__name__}, past the layer", always=False)
    return None


def _weights_read(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes whose `.weight` the methods of a class compute with, and those that they hand to a function of their own.

    Transformers' Mamba layers write `self.dt_proj.weight @ x`, and pass out_proj's weight to mamba_ssm where that is there.
    """
    if kind.__module__.partition(".")[0] == "torch":  # nn.MultiheadAttention is known as what it is
        return frozenset(), frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # no source, as in a notebook
        return frozenset(), frozenset()
    used: set[str] = set()
    handed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            used.update(filter(None, (_weight_of(node.left), _weight_of(node.right))))
        elif isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            function = ast.unparse(node.func)
            own = handed if isinstance(node.func, ast.Name) and not hasattr(builtins, function) else None  # T5 asks isinstance
            into = used if _computes(function) else own
            if into is not None:
                into.update(filter(None, (_weight_of(value) for value in values)))
    return frozenset(used), frozenset(handed)


def _computes(function: str) -> bool:
    """Whether a dotted name is torch's own arithmetic (F.linear, torch.matmul): no filling of a weight, no look at its kind."""
    package, _, name = function.partition(".")
    last = name.rpartition(".")[2]
    return package in ("F", "functional", "nn", "torch") and not (
        "init" in name or last.endswith(("_", "_like")) or last.startswith("is_") or last == "Parameter"
    )


def _weight_of(node: ast.expr) -> str | None:
    """X of the expression self.X.weight (also transposed: .T, .t())."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "t":
        node = node.func.value
    if isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        node = node.value
    if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)):
        return None
    owner = node.value
    return owner.attr if isinstance(owner.value, ast.Name) and owner.value.id == "self" else None
