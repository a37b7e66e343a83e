"""What target_modules="all-linear" stands for: the linear layers of the language model's body, and never a part of it in
silence. Found by Transformers' own conventions (get_decoder, get_text_config, base_model), not by a table of models.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from losia_dist.errors import ConfigError
from losia_dist.subnet.kinds import is_linear, why_unusable

Shape = Callable[[Tensor], tuple[int, ...]]

# Layers that choose or weigh experts. They stay frozen: a few rows that decide where every token goes.
_ROUTER = re.compile(r"gate|.*_gate|.*router.*")


def all_linear(
    model: nn.Module, linears: dict[str, Any], output: str | None, trained_in_full: list[str], shape: Shape
) -> list[str]:
    """Names, out of `linears` (every linear layer of the model by full name), that "all-linear" means.

    Of a model of several parts (vision, audio and language) the language model's; never the output layer, and nothing
    inside a module that trains in full.

    Args:
        output: full name of the output layer, or None.
        trained_in_full: names of the modules of `modules_to_save`.
        shape: the whole shape of a parameter that an engine may have sharded.

    Raises:
        ConfigError: experts, a head or a special kind of linear layer would stay frozen; the message lists them and says
            what to set instead.
    """
    part = language_part(model)
    names = [
        name
        for name in linears
        if _inside(name, part) and name != output and not any(_inside(name, saved) for saved in trained_in_full)
    ]
    _refuse_experts(model, part, names, shape)
    _refuse_heads(model, names)
    _refuse_special_kinds(linears, names)
    if part:
        depth = part.count(".") + 1
        frozen = {".".join(name.split(".")[:depth]) for name in linears if not _inside(name, part) and name != output}
        logging.getLogger(__name__).info("all-linear trains %s; frozen: %s", part, ", ".join(sorted(frozen)))
    return names


def language_part(model: Any) -> str:
    """Full name of the language model inside a model of several parts; "" if the whole model is one.

    Raises:
        ConfigError: several parts, of which Transformers names none as the decoder.
    """
    config = getattr(model, "config", None)
    text_config: Any = getattr(config, "get_text_config", None)
    if text_config is None or not hasattr(model, "get_decoder"):
        return ""
    try:
        if text_config() is config:
            return ""
        decoder = model.get_decoder()
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise _no_language_part(model) from error
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if not name or type(getattr(decoder, "config", None)) is type(config):
        raise _no_language_part(model)
    return name


def expert_weights(model: nn.Module, part: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Weights of mixture-of-experts layers under `part`: fused ones, [experts, ., .], and those of a list of experts."""
    found = {}
    for module_name, module in model.named_modules():
        if not _inside(module_name, part) or isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            size = shape(parameter)
            fused = len(size) == 3 and min(size) > 1
            if fused or (len(size) == 2 and is_expert(module_name)):
                found[f"{module_name}.{name}"] = size
    return found


def is_expert(name: str) -> bool:
    """Whether a module's full name places it among experts ("model.layers.0.mlp.experts.3.w1")."""
    return "experts" in name.split(".")


def _refuse_experts(model: nn.Module, part: str, names: list[str], shape: Shape) -> None:
    experts = expert_weights(model, part, shape)
    if not experts:
        return
    others = [name for name in names if not is_expert(name) and not _is_router(name)]
    frozen = sum(_product(size) for size in experts.values())
    rest = sum(_product(shape(module.weight)) for name, module in model.named_modules() if name in others and is_linear(module))
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in others))
    endings = [e for e in endings if not any(is_expert(name) and name.endswith(f".{e}") for name in names)]
    fix = f"To train the other linear layers alone, name them: target_modules={endings}." if endings else ""
    share = frozen / (frozen + rest)
    raise ConfigError(
        f"target_modules='all-linear' would leave the experts of {type(model).__name__} frozen, {share:.0%} of the weights it "
        f"stands for: experts get no subnet in this version ({_some(experts)}). {fix}".rstrip()
    )


def _refuse_heads(model: Any, names: list[str]) -> None:
    base = getattr(model, "base_model", None)
    if base is None or base is model:
        return
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    heads = [name for name in names if not _inside(name, prefix)]
    if heads:
        saved = sorted({name.split(".")[0] for name in heads})
        raise ConfigError(
            f"target_modules='all-linear' stands for the layers of the model's body ({prefix}), and {_some(heads)} lies "
            f"outside: a head, often new, that has to train as a whole. Add modules_to_save={saved}, or name target_modules to "
            "leave it frozen."
        )


def _refuse_special_kinds(linears: dict[str, nn.Module], names: list[str]) -> None:
    unusable = {name: reason for name in names if (reason := why_unusable(linears[name])) is not None}
    if unusable:
        name, reason = next(iter(unusable.items()))
        raise ConfigError(
            f"target_modules='all-linear': {name!r} {reason}, so it cannot hold a subnet"
            f"{f', and {len(unusable) - 1} more' if len(unusable) > 1 else ''}. Load the model unquantized and without "
            "device_map, or name target_modules to leave such layers frozen."
        )


def _no_language_part(model: nn.Module) -> ConfigError:
    return ConfigError(
        f"target_modules='all-linear': {type(model).__name__} has several parts, and get_decoder() names none of them as its "
        "language model. Name target_modules: a list of endings such as ['q_proj'], or an expression over full names."
    )


def _is_router(name: str) -> bool:
    return any(_ROUTER.fullmatch(part) for part in name.split("."))


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _product(size: tuple[int, ...]) -> int:
    total = 1
    for length in size:
        total *= length
    return total


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
