"""What target_modules="all-linear" stands for: the linear layers of the language model's body, and never a part of it in
silence. Found by Transformers' own conventions (get_decoder, get_text_config, base_model), not by a table of models.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from losia_dist.errors import ConfigError, some
from losia_dist.subnet.expert_weights import ExpertWeight, Shape, is_router
from losia_dist.subnet.kinds import is_linear, why_unusable
from losia_dist.subnet.listed_experts import block_of, is_listed
from losia_dist.subnet.reach import unreached

_logger = logging.getLogger(__name__)

# Layers that choose or weigh experts. They stay frozen: a few rows that decide where every token goes.
_ROUTER = re.compile(r"gate|.*_gate|.*router.*")


def all_linear(
    model: nn.Module,
    linears: dict[str, Any],
    experts: dict[str, ExpertWeight],
    output: str | None,
    trained_in_full: list[str],
    shape: Shape,
) -> list[str]:
    """Names, out of `linears` (every linear layer of the model by full name) and `experts`, that "all-linear" means.

    Of a model of several parts (vision, audio and language) the language model's; never the output layer, nothing inside a
    module that trains in full, and no layer that gets no gradient (`reach`); what is left out so is logged.

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
    left_out = unreached(model, names)
    blocks = {one.block for one in experts.values()} | {block_of(name) for name in names if is_listed(name)}
    routers = [name for name in names if is_router(name, blocks)]
    names = [name for name in names if name not in left_out and name not in routers]
    fused = [n for n in experts if _inside(n, part) and not any(_inside(n, saved) for saved in trained_in_full)]
    _refuse_experts(model, part, names, linears, fused, trained_in_full, shape)
    _refuse_heads(model, names)
    _refuse_special_kinds(linears, names, fused)
    if part and any(not _inside(name, part) and name != output for name in linears):
        depth = part.count(".") + 1
        frozen = {".".join(name.split(".")[:depth]) for name in linears if not _inside(name, part) and name != output}
        _logger.info("all-linear trains %s; frozen: %s", part, ", ".join(sorted(frozen)))
    for reason in dict.fromkeys(why.reason for why in left_out.values()):
        chosen = [name for name, why in left_out.items() if why.reason == reason]
        _logger.warning(
            "all-linear leaves out %s (%d in all), where no gradient would come: each %s", _kinds(chosen), len(chosen), reason
        )
    _say_what_is_no_layer(model, part, names, [*fused, *names, *trained_in_full], shape)
    return names + fused


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


def stacked_weights(model: nn.Module, part: str, shape: Shape) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Weights under `part` that hold several matrices, or one of a list of experts: shape, and whether they are experts.

    Experts are known by their names or their module's class, or by as many matrices as the configuration has experts. Others
    are projections by head (XLNet) or block-diagonal gates (RecurrentGemma).
    """
    numbers = _expert_numbers(model)
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for module_name, module in model.named_modules():
        if not _inside(module_name, part) or isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        words = f"{module_name}.{type(module).__name__}".lower()
        for name, parameter in module.named_parameters(recurse=False):
            size = shape(parameter)
            named = "expert" in f"{words}.{name}".lower() or "moe" in words
            if len(size) == 3 and min(size[1:]) > 1 and (size[0] > 1 or named):
                # Shared experts see every token: what holds several of them is no mixture.
                found[f"{module_name}.{name}"] = (size, (named or size[0] in numbers) and "shared" not in words)
            elif len(size) == 2 and is_listed(module_name) and not name.endswith("bias"):
                found[f"{module_name}.{name}"] = (size, True)
    return found


def _expert_numbers(model: Any) -> set[int]:
    """How many experts a layer may have, by any setting that speaks of them (num_experts, n_routed_experts)."""
    config = getattr(model, "config", None)
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", None) or {})]
    found: set[int] = set()
    for one in parts:
        for key, value in vars(one).items() if one is not None else ():
            if "expert" in key and "tok" not in key and isinstance(value, int) and value > 1:
                found.add(value)
    return found


def _refuse_experts(
    model: nn.Module,
    part: str,
    names: list[str],
    linears: dict[str, Any],
    fused: list[str],
    trained_in_full: list[str],
    shape: Shape,
) -> None:
    """Experts that can hold no subnets (those of `fused` and linear layers can) and do not train in full."""
    listed = {f"{name}.weight" for name in names if is_listed(name) and why_unusable(linears[name]) is None}
    experts = {
        name: size
        for name, (size, expert) in stacked_weights(model, part, shape).items()
        if expert and name not in listed and name not in fused and not any(_inside(name, saved) for saved in trained_in_full)
    }
    if not experts:
        return
    others = [name for name in names if not is_listed(name) and not _is_router(name) and why_unusable(linears[name]) is None]
    frozen = sum(_product(size) for size in experts.values())
    rest = sum(_product(shape(module.weight)) for name, module in model.named_modules() if name in others and is_linear(module))
    modules = _names_for(others, [name for name, module in model.named_modules() if is_linear(module)], part)
    fix = f"To train the other linear layers alone, name them: target_modules={modules!r}." if others else ""
    share = frozen / (frozen + rest)
    raise ConfigError(
        f"target_modules='all-linear' would leave the experts of {type(model).__name__} frozen, {share:.0%} of the weights it "
        f"stands for: experts get no subnet in this version ({some(experts, 3)}). {fix}".rstrip()
    )


def _names_for(wanted: list[str], available: list[str], part: str) -> list[str] | str:
    """Endings that match all of `wanted` and no other of the linear layers; an expression where a list would be long."""
    others = set(available) - set(wanted)
    inside = [name for name in others if _inside(name, part)]
    endings = list(dict.fromkeys(_ending(name, inside) for name in wanted))
    if not any(other.endswith(f".{ending}") for other in others for ending in endings) and len(endings) < 40:
        return endings
    # [.] for a dot: without backslashes the expression is the same in Python and in YAML.
    start, *ends = (name.replace(".", "[.]") for name in (f"{part}." if part else "", *endings))
    return f"{start}(.*[.])?({'|'.join(ends)})"


def _ending(name: str, others: list[str]) -> str:
    """The shortest end of a full name that none of the others has."""
    words = name.split(".")
    ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
    return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)


def _say_what_is_no_layer(model: nn.Module, part: str, names: list[str], trains: list[str], shape: Shape) -> None:
    found = stacked_weights(model, part, shape)
    stacked = {name: size for name, (size, _) in found.items() if not any(_inside(name, other) for other in trains)}
    if not stacked:
        return
    frozen = sum(_product(size) for size in stacked.values())
    trained = set(names)
    rest = sum(_product(shape(module.weight)) for name, module in model.named_modules() if name in trained)
    _logger.warning(
        "all-linear: %s hold several matrices each and are no linear layers; they stay frozen, %.0f %% of the weights",
        _kinds(stacked),
        100 * frozen / (frozen + rest),
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
            f"target_modules='all-linear' stands for the layers of the model's body ({prefix}), and {some(heads, 3)} lies "
            f"outside: a head, often new, that has to train as a whole. Add modules_to_save={saved}, or name target_modules to "
            "leave it frozen."
        )


def _refuse_special_kinds(linears: dict[str, nn.Module], names: list[str], fused: list[str]) -> None:
    unusable = {name: why for name in names if (why := why_unusable(linears[name])) is not None}
    if unusable:
        name, why = next(iter(unusable.items()))
        rest = [*(one for one in names if one not in unusable), *fused]
        fixes = [why.fix] if why.fix else []
        if rest:
            names_of_rest = _names_for(rest, [*linears, *fused], "")
            fixes.append(f"{'or name' if fixes else 'Name'} the others to leave it frozen: target_modules={names_of_rest!r}")
        raise ConfigError(
            f"target_modules='all-linear': {name!r} {why.reason}, so it cannot hold a subnet"
            f"{f', and {len(unusable) - 1} more' if len(unusable) > 1 else ''}. "
            f"{', '.join(fixes) or 'No other layer is left to train'}."
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


def _kinds(names: Any) -> str:
    """Full names, those that differ by numbers alone once: "model.layers.*.mlp.wq"."""
    return some(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names), 3)
