"""Names and forms of weights on disk against those of Transformers' modules: renamed, split, fused (experts), or as they are.

Transformers keeps the rules for each architecture and applies them while it loads; here the same rules say beforehand which
stored tensors make which parameter, so that those which are only renamed can be read in parts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losia_dist.recipe.weights.model_files import ReadWhole


@dataclass
class Conversion:
    """Stored tensors that are computed into others, all at once. rule: Transformers' converter. key: first target's name."""

    rule: Any
    key: str
    dtype: torch.dtype
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name on disk, pattern that it matched)

    def run(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The targets by their names in the model; `read` gives a stored tensor, and is called once for each."""
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.sources:
            # A function, so that no tensor is read before all are asked for.
            rule.add_tensor(self.key, name, pattern, lambda name=name: read(name).to(self.dtype))
        made = rule.convert(self.key, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass
class Naming:
    """direct: name in the model -> name on disk. left_over: stored tensors that the model has no place for."""

    direct: dict[str, str]
    conversions: list[Conversion]
    left_over: list[str]


def match_names(model: Any, stored: list[str]) -> Naming:
    """Place every stored tensor by the rules that `from_pretrained` loads with, in its order.

    model: on the meta device or not; its conversion rules are noted on it, as loading does, for saving under the old names.

    Raises:
        ReadWhole: this release of Transformers keeps its rules elsewhere.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        raise ReadWhole(f"is read by rules that this release of Transformers keeps elsewhere ({error})") from error

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = model.state_dict()
    direct: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    left_over = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            left_over.append(name)
        elif pattern is None:
            direct.setdefault(target, name)
        else:
            rule = Conversion(of_pattern[pattern], target, known[target].dtype)
            conversions.setdefault(target, rule).sources.append((name, pattern))
    model._weight_conversions = [rule for rule in rules if rule.was_used()]
    return Naming(direct, list(conversions.values()), _unexpected(model, left_over))


def keep_precision(model: Any, dtype: torch.dtype) -> None:
    """Give the meta parameters that an architecture keeps in fp32 in a bf16 model their dtype, as loading does."""
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None)
    if not patterns or dtype != torch.bfloat16:
        return
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, parameter in model.named_parameters():
        if kept.search(name) and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


def _unexpected(model: Any, names: list[str]) -> list[str]:
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    ignored = re.compile("|".join([*patterns, r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]))
    return [name for name in names if not ignored.search(name)]
