"""Which modules of a model are meant by a name, a list of names or a regular expression (PEFT's conventions)."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from torch import nn

from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """One linear layer that gets a subnet."""

    name: str
    module: nn.Linear
    group_name: str
    is_output: bool


def find_targets(model: nn.Module, config: LoSiAConfig) -> list[Target]:
    """Target layers in localization order: decoder layers as they stand in the model, the output layer last.

    Raises:
        ConfigError: no linear layer at all, a name that matches none (with the nearest ones), or a layer whose weight
            is not an ordinary floating-point one.
    """
    linears = {name: module for name, module in model.named_modules() if _is_plain_linear(module)}
    if not linears:
        raise ConfigError(
            f"{type(model).__name__} has no torch.nn.Linear layer, so there is nothing to train. Pass the model itself, "
            "not a wrapper around it; LoSiA trains linear layers only."
        )
    output = output_layer_name(model)
    names = _select(linears, config.target_modules, output)
    if config.output_rank_factor is not None:
        if output is None or output not in linears:
            raise ConfigError(
                f"output_rank_factor={config.output_rank_factor} asks for the output layer, but {type(model).__name__} names "
                "none (get_output_embeddings). Remove output_rank_factor."
            )
        names = [name for name in names if name != output] + [output]
    attention_parts = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    targets = []
    for name in names:
        if any(name.startswith(part) for part in attention_parts):
            # nn.MultiheadAttention reads its projections' weights without calling them: a subnet there would never train.
            if config.target_modules == "all-linear":
                continue
            raise ConfigError(f"{name!r} belongs to a torch.nn.MultiheadAttention, which bypasses it; leave it out.")
        if not linears[name].weight.is_floating_point():
            raise ConfigError(f"{name!r} has a {linears[name].weight.dtype} weight; LoSiA trains unquantized layers only.")
        targets.append(Target(name, linears[name], name if name == output else group_of(name), name == output))
    # A group is re-localized as a whole, so its layers stand together; sorting is stable and keeps the model's order.
    order = {group: place for place, group in enumerate(dict.fromkeys(t.group_name for t in targets))}
    return sorted(targets, key=lambda target: (target.is_output, order[target.group_name]))


def group_of(name: str) -> str:
    """Decoder layer of a module: its name up to the first number ("model.layers.3"), else the module it sits in."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ".".join(parts[:-1]) or name


def output_layer_name(model: nn.Module) -> str | None:
    """Full name of the model's output layer (lm_head), or None."""
    get_output = getattr(model, "get_output_embeddings", None)
    module = get_output() if callable(get_output) else None
    return next((name for name, candidate in model.named_modules() if candidate is module), None) if module else None


def match_names(available: list[str], wanted: list[str], option: str) -> list[str]:
    """Names equal to a wanted one or ending in it after a dot; each wanted name must match something."""
    for item in wanted:
        if not any(_name_matches(name, item) for name in available):
            endings = sorted({name.rsplit(".", 1)[-1] for name in available} | set(available))
            nearest = difflib.get_close_matches(item, endings, n=3, cutoff=0.3)
            raise ConfigError(f"{option}: no module is named {item!r}. Nearest: {', '.join(nearest or endings[:5])}.")
    return [name for name in available if any(_name_matches(name, item) for item in wanted)]


def _select(linears: dict[str, nn.Linear], wanted: str | list[str], output: str | None) -> list[str]:
    if wanted == "all-linear":
        return [name for name in linears if name != output]
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ConfigError(f"target_modules={wanted!r} is not a valid regular expression: {error}.") from error
        names = [name for name in linears if pattern.fullmatch(name)]
        if not names:
            nearest = difflib.get_close_matches(wanted, linears, n=3, cutoff=0.1) or list(linears)[:3]
            raise ConfigError(
                f"target_modules={wanted!r}: no linear layer's full name matches this expression. Nearest: "
                f"{', '.join(nearest)}. A list of endings, such as ['q_proj'], works too."
            )
    else:
        names = match_names(list(linears), wanted, "target_modules")
    if output in names:
        raise ConfigError(
            f"target_modules names the output layer {output!r}: set output_rank_factor instead (it keeps all columns)."
        )
    return names


def _is_plain_linear(module: nn.Module) -> bool:
    # A subclass with a forward of its own (quantized layers, for example) computes something else.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _name_matches(name: str, item: str) -> bool:
    return name == item or name.endswith("." + item)
