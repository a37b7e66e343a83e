"""Which modules of a model are meant by a name, a list of names or a regular expression (PEFT's conventions)."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, some
from losia_dist.subnet.all_linear import all_linear
from losia_dist.subnet.expert_parts import parts_of
from losia_dist.subnet.expert_weights import ExpertWeight, Shape, expert_weights, why_unusable_experts
from losia_dist.subnet.kinds import is_linear, is_quantized_substitute, stores_transposed, why_unusable
from losia_dist.subnet.layout import Layout
from losia_dist.subnet.reach import unreached
from losia_dist.subnet.site import Site

_logger = logging.getLogger(__name__)


def _plain_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)


@dataclass(frozen=True)
class Target:
    """A place that gets a subnet: a linear layer (`nn.Linear`, or `Conv1D` of Transformers), or experts of a fused weight.

    name: full name of the layer, or of the weight, with the part where there are several. weight_name: without the part.
    parameter: the weight's name in the module. part: place of the part among those of the weight; -1: it is all.
    """

    name: str
    module: Any
    group_name: str
    is_output: bool
    weight_name: str
    layout: Layout
    parameter: str = "weight"
    part: int = -1
    owner: Any = None

    @property
    def weight(self) -> nn.Parameter:
        """As it is stored."""
        return getattr(self.module, self.parameter)  # type: ignore[no-any-return]


Placed = TypeVar("Placed", Target, Site)


def find_targets(model: nn.Module, config: LoSiAConfig, shape: Shape = _plain_shape) -> list[Target]:
    """Targets in localization order: decoder layers as they stand in the model, parts of a layer's experts behind it, the
    output layer last.

    shape gives the whole shape of a parameter that an engine may have sharded.

    Raises:
        ConfigError: no linear layer at all, a name that matches none (with the nearest ones), a layer that cannot hold a
            subnet, experts of an unknown kind, or something that "all-linear" would leave frozen in silence.
    """
    aliases = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_linear(module)}
    _refuse_substitutes(model, config)
    if not aliases:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer (torch.nn.Linear, or Conv1D of Transformers), so there is nothing to "
            "train. Pass the model itself, not a wrapper around it; LoSiA trains linear layers and experts only."
        )
    experts = expert_weights(model, shape)
    first_name = {id(module): name for name, module in reversed(aliases.items())}
    output = output_layer_name(model)
    # nn.MultiheadAttention reads its projections' weights without calling them: a subnet there would never train.
    bypassed = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if config.target_modules == "all-linear":
        usable = {n: m for n, m in aliases.items() if first_name[id(m)] == n and not _within(n, bypassed)}
        names = all_linear(model, usable, experts, output, saved_modules(model, config), shape)
    else:
        # A layer that several modules share is one target, under its first name, whichever of its names was given.
        chosen = _chosen([*aliases, *experts], config.target_modules, output)
        linear = [name for name in chosen if name in aliases]
        names = list(dict.fromkeys(first_name[id(aliases[name])] for name in linear))
        _refuse_unusable(aliases, names, bypassed)
        _refuse_unreached(model, names)
        fused = [name for name in chosen if name not in aliases]
        _tell_halves(fused, experts)
        names += fused
    if config.output_rank_factor is not None:
        if output is None or output not in aliases:
            raise ConfigError(
                f"output_rank_factor={config.output_rank_factor} asks for the output layer, but {type(model).__name__} names "
                "none (get_output_embeddings). Remove output_rank_factor."
            )
        _refuse_unusable(aliases, [output], bypassed)
        names = [name for name in names if name != output] + [output]
    if not names:
        raise ConfigError(
            "target_modules='all-linear' leaves no layer to train: modules_to_save names all of them, or the only linear layer "
            "is the output layer (output_rank_factor)."
        )
    targets = [_linear_target(name, aliases[name], is_output=name == output) for name in names if name in aliases]
    targets += _expert_targets([experts[name] for name in names if name in experts], config, shape)
    place = {id(module): place for place, module in enumerate(model.modules())}
    return in_localization_order(sorted(targets, key=lambda target: place[id(target.module)]))


def in_localization_order(found: Iterable[Placed]) -> list[Placed]:
    """Targets, or sites, of a model in its order -> in that in which groups localize.

    Decoder layers as they come, the parts of a layer's experts as groups behind its own, wherever the model holds them, the
    output layer last. A group is re-localized as a whole, so its layers stand together.
    """
    found = list(found)
    layers = {layer: place for place, layer in enumerate(dict.fromkeys(group_of(one.name) for one in found))}
    return sorted(found, key=lambda one: (one.is_output, layers[group_of(one.name)], one.part))


def _linear_target(name: str, module: Any, *, is_output: bool) -> Target:
    group = name if is_output else group_of(name)
    return Target(name, module, group, is_output, name, Layout(transposed=stores_transposed(module)))


def _tell_halves(chosen: list[str], experts: dict[str, ExpertWeight]) -> None:
    """Say where a list means one weight of experts and not the others: "down_proj" does, beside "gate_up_proj"."""
    owners = {id(experts[name].owner) for name in chosen}
    frozen = [name for name, one in experts.items() if id(one.owner) in owners and name not in chosen]
    if frozen:
        _logger.warning("target_modules trains %s of the experts; %s stay frozen", some(chosen, 1), some(frozen, 1))


def _expert_targets(weights: list[ExpertWeight], config: LoSiAConfig, shape: Shape) -> list[Target]:
    """A target for each weight, or for each of its parts, where experts of a layer localize in parts."""
    targets = []
    elements: dict[int, int] = {}  # of one expert, in all weights of its module that train
    for one in weights:
        why = why_unusable_experts(one.owner)
        if why is not None:
            raise ConfigError(f"the experts of {one.name!r} cannot hold subnets: {type(one.owner).__name__} {why}.")
        m, n = one.layout.matrix_shape(shape(getattr(one.module, one.parameter)))
        elements[id(one.owner)] = elements.get(id(one.owner), 0) + m * n
    for one in weights:
        asked = None if config.located is None else config.experts_per_slot
        parts = parts_of(one.layout.count, elements[id(one.owner)], asked)
        for place, (start, stop) in enumerate(parts):
            group, name, part = group_of(one.name), one.name, -1
            if len(parts) > 1:
                group, name, part = f"{group}.experts[{start}:{stop}]", f"{one.name}[{start}:{stop}]", place
            layout = replace(one.layout, experts=(start, stop))
            targets.append(Target(name, one.module, group, False, one.name, layout, one.parameter, part, one.owner))
    return targets


def saved_modules(model: nn.Module, config: LoSiAConfig) -> list[str]:
    """Full names of the modules that `modules_to_save` trains in full."""
    names = [name for name, _ in model.named_modules() if name]
    return match_names(names, config.modules_to_save or [], "modules_to_save")


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


def _chosen(available: list[str], wanted: str | list[str], output: str | None) -> list[str]:
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ConfigError(f"target_modules={wanted!r} is not a valid regular expression: {error}.") from error
        names = [name for name in available if pattern.fullmatch(name)]
        if not names:
            nearest = difflib.get_close_matches(wanted, available, n=3, cutoff=0.1) or available[:3]
            raise ConfigError(
                f"target_modules={wanted!r}: no full name of a linear layer or of experts matches this expression. Nearest: "
                f"{', '.join(nearest)}. A list of endings, such as ['q_proj'], works too."
            )
    else:
        names = match_names(available, wanted, "target_modules")
    if output in names:
        raise ConfigError(
            f"target_modules names the output layer {output!r}: set output_rank_factor instead (it keeps all columns)."
        )
    return names


def _refuse_unusable(linears: dict[str, nn.Module], names: list[str], bypassed: list[str]) -> None:
    for name in names:
        unusable = why_unusable(linears[name])
        if unusable is not None:
            fix = f"{unusable.fix}, or leave" if unusable.fix else "Leave"
            raise ConfigError(f"{name!r} {unusable.reason}, so it cannot hold a subnet. {fix} the layer out of target_modules.")
        if _within(name, bypassed):
            raise ConfigError(f"{name!r} belongs to a torch.nn.MultiheadAttention, which bypasses it; leave it out.")


def _refuse_unreached(model: nn.Module, names: list[str]) -> None:
    for name, why in unreached(model, names).items():
        if why.always:
            raise ConfigError(
                f"{name!r} gets no gradient: it {why.reason}. Leave the layer out of target_modules; longer names tell layers "
                "apart, such as 'self_attn.q_proj'."
            )


def _refuse_substitutes(model: nn.Module, config: LoSiAConfig) -> None:
    """Quantized layers that are no `nn.Linear` would be passed over as if the model did not have them."""
    packed = {name: type(module).__name__ for name, module in model.named_modules() if is_quantized_substitute(module)}
    wanted = config.target_modules
    if isinstance(wanted, list):
        packed = {name: kind for name, kind in packed.items() if any(_name_matches(name, item) for item in wanted)}
    elif wanted != "all-linear":
        try:
            packed = {name: kind for name, kind in packed.items() if re.fullmatch(wanted, name)}
        except re.error:  # said where the expression is used
            return
    if packed:
        name, kind = next(iter(packed.items()))
        raise ConfigError(
            f"target_modules={wanted!r}: {name!r} is a quantized layer ({kind})"
            f"{f', and so are {len(packed) - 1} more' if len(packed) > 1 else ''}: there is no weight to cut a subnet "
            "from. Load the model unquantized, or name other layers."
        )


def _within(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _name_matches(name: str, item: str) -> bool:
    return name == item or name.endswith("." + item)
