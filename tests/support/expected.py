"""What the dense reference is told to train: groups, first subnets, what trains in full.

Of models without experts it is read from the converted model, as it always was. Of mixtures it is worked out here from
docs/algorithm.md and the plain model's own names, and nothing of the package decides it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist import LoSiAConfig, get_losia_model
from losia_dist.subnet.convert import find_sites
from tests.reference.dense import draw
from tests.reference.experts import Layer, groups_of

# Families whose experts' matrices are stored as [E, n, m].
STORED_TRANSPOSED = ("gpt_oss", "llama4_text")
_LAYER = re.compile(r"model\.layers\.\d+")
_ROUTER = re.compile(r".*\.(gate|router)")


@dataclass
class Targets:
    """For tests.reference.dense: keys are weight names, or those of parts of experts."""

    groups: dict[str, list[str]]
    subnets: dict[str, tuple[Tensor, Tensor]]
    trained: list[str]
    transposed: set[str]
    experts: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    rate_scales: dict[str, float] = field(default_factory=dict)


def converted_targets(model: nn.Module, config: LoSiAConfig) -> Targets:
    """Read from a model without experts among its targets, which this converts."""
    layers = find_sites(get_losia_model(model, config))
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.group_name, []).append(f"{layer.name}.weight")
    subnets = {f"{layer.name}.weight": (layer.row_index.clone(), layer.col_index.clone()) for layer in layers}
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".subnet")]
    return Targets(groups, subnets, trained, {f"{layer.name}.weight" for layer in layers if layer.weight_is_transposed})


def mixture_targets(model: Any, config: Mapping[str, Any]) -> Targets:
    """What target_modules="all-linear" means for a plain mixture of experts; config: as LoSiAConfig takes it.

    Settings that no test of mixtures uses are not read: rank_pattern, modules_to_save, train_norms, train_embeddings.
    """
    parameters = dict(model.named_parameters())
    kind = model.config.model_type
    swapped = {n for n, p in parameters.items() if p.ndim == 3 and ".experts." in n and kind in STORED_TRANSPOSED}
    layers: dict[str, Layer] = {}
    routers = []
    for module_name, module in model.named_modules():
        layer = _LAYER.match(module_name)
        if layer and _ROUTER.fullmatch(module_name):
            routers += [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
        elif layer:
            here = layers.setdefault(layer[0], Layer(layer[0]))
            if isinstance(module, nn.Linear):
                here.linear.append(f"{module_name}.weight")
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3 and not isinstance(module, nn.Conv1d):
                    full = f"{module_name}.{name}"
                    experts, *size = weight.shape
                    here.fused[full] = (experts, *(reversed(size) if full in swapped else size))
    share = config.get("output_rank_factor")
    drawn = config.get("selection", "greedy") == "random" or type(config.get("selection")).__name__ == "Drawn"
    shares = getattr(config.get("selection"), "share_columns", drawn)  # a text, or none: the default
    output = ["lm_head.weight"] if share else []
    groups, experts = groups_of(list(layers.values()), output, config.get("experts_per_slot", "auto"), drawn)

    factor = config.get("rank_factor", 0.125)
    factors = factor if isinstance(factor, tuple | list) else (factor, factor)
    subnets = {}
    for key in (key for group in groups.values() for key in group):
        name, first, last = experts.get(key, (key, 0, 0))
        shape = list(parameters[name].shape[-2:])
        m, n = reversed(shape) if name in swapped else shape
        chosen = (share, 1) if name in output else factors
        size = (_floor(chosen[0], m), _floor(chosen[1], n))
        names = [f"{name}.{expert}" for expert in range(first, last)] or [name.removesuffix(".weight")]
        width = n if shares and key not in experts else None
        drawn_now = [draw(one, m, torch.arange(n), size, config.get("seed", 0), shared_width=width) for one in names]
        rows, columns = (torch.stack(part) for part in zip(*drawn_now, strict=True))
        subnets[key] = (rows, columns) if key in experts else (rows[0], columns[0])
    scale = config.get("router_lr_scale")
    return Targets(
        groups,
        subnets,
        trained=routers if scale else [],
        transposed=swapped,
        experts=experts,
        rate_scales=dict.fromkeys(routers, scale) if scale else {},
    )


def _floor(factor: float, size: int) -> int:
    return int(Fraction(str(factor)) * size)
