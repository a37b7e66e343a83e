"""What a model has in memory of the weights in its files: renamed, split, fused (experts), or as they are.

Transformers keeps the rules for each architecture and applies them while it loads; here the same rules say beforehand which
stored tensors make which parameter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint.stored_names import plain_classes
from losia_dist.checkpoint.tensor_names import plain_name
from losia_dist.errors import CheckpointError
from losia_dist.export.model_directory import ModelDirectory


@dataclass
class Conversion:
    """Stored tensors that are computed into others, all at once. rule: Transformers' converter. key: first target's name.

    dtype: that they are cast to before; None: their own.
    """

    rule: Any
    key: str
    dtype: torch.dtype | None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name on disk, pattern that it matched)

    def run(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The targets by their names in the model; `read` gives a stored tensor, and is called once for each."""
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.sources:
            # A function, so that no tensor is read before all are asked for.
            rule.add_tensor(self.key, name, pattern, lambda name=name: self._cast(read(name)))
        made = rule.convert(self.key, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)


@dataclass
class Naming:
    """direct: name in the model -> name on disk. left_over: stored tensors that the model has no place for. used: the rules
    that matched.
    """

    direct: dict[str, str]
    conversions: list[Conversion]
    left_over: list[str]
    used: list[Any]


def match_names(model: Any, stored: Iterable[str], known: dict[str, torch.dtype | None]) -> Naming:
    """Place every stored tensor by the rules that `from_pretrained` loads with, in its order.

    Args:
        model: of Transformers; on the meta device or not, sharded or not.
        known: names in the model, and what stored tensors are cast to for each.

    Raises:
        ImportError: this release of Transformers keeps its rules elsewhere.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    with plain_classes(model):
        rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    there = dict.fromkeys(known, True)
    direct: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    left_over = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            left_over.append(name)
        elif pattern is None:
            direct.setdefault(target, name)
        else:
            rule = Conversion(of_pattern[pattern], target, known[target])
            conversions.setdefault(target, rule).sources.append((name, pattern))
    used = [rule for rule in rules if rule.was_used()]
    return Naming(direct, list(conversions.values()), _unexpected(model, left_over), used)


def _unexpected(model: Any, names: list[str]) -> list[str]:
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    ignored = re.compile("|".join([*patterns, r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]))
    return [name for name in names if not ignored.search(name)]


class LoadedWeights:
    """Weights of a plain model directory in the form that a model has in memory, one at a time, on the CPU.

    Args:
        path: the directory.
        model: gives the model whose names are asked for, without wrappers; called where the files have others.
        names: that will be asked for.
        suffix: of the stored names of what is wanted beside the weights, and is split and fused as they are: their scales.

    Raises:
        CheckpointError: no safetensors weights there.
    """

    def __init__(self, path: str | Path, model: Callable[[], Any], names: Iterable[str], suffix: str = "") -> None:
        self.path, self._files, self._suffix = Path(path), ModelDirectory(path), suffix
        self._direct = {name: name for name in names if name + suffix in self._files}
        self._made: dict[str, Conversion] = {}
        self._likes: dict[str, Tensor] = {}
        self._model: Any = None
        if any(name not in self._direct for name in names):
            self._find(model())

    def _find(self, model: Any) -> None:
        self._model = model
        known: dict[str, torch.dtype | None] = {plain_name(name): None for name in model.state_dict(keep_vars=True)}
        try:
            stored = [name.removesuffix(self._suffix) for name in self._files.names if name.endswith(self._suffix)]
            naming = match_names(model, stored, known)
            for conversion in naming.conversions:
                made = conversion.run(model, self._stored_like)
                self._made |= dict.fromkeys(made, conversion)
                self._likes |= made
        except Exception as error:  # whatever a rule of Transformers raises, or a model that is none of its
            raise CheckpointError(
                f"the weights of {type(model).__name__} in memory could not be made from the files in {self.path} "
                f"({type(error).__name__}: {error})."
            ) from error
        self._direct = {**naming.direct, **self._direct}

    def like(self, name: str) -> Tensor | None:
        """A tensor without data, of the shape and dtype that a weight has in memory; None: the files do not have it."""
        return self._stored_like(self._direct[name]) if name in self._direct else self._likes.get(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a weight, in memory; None: the files do not have it."""
        like = self.like(name)
        return None if like is None else tuple(like.shape)

    def check_original(self, name: str) -> None:
        """Of a weight that is there.

        Raises:
            CheckpointError: the files hold codes in its place.
        """
        there = self.like(name)
        assert there is not None
        if not there.is_floating_point() or there.dtype.itemsize < 2:
            raise CheckpointError(
                f"{name} in {self.path} is in {str(there.dtype).removeprefix('torch.')}: the original's weights are needed, as "
                "they were before quantization."
            )

    def tensor(self, name: str) -> Tensor:
        """A weight that is there, whole, in the dtype of the files."""
        if name in self._direct:
            return self._stored(self._direct[name])
        return self._made[name].run(self._model, self._stored)[name]

    def _stored_like(self, name: str) -> Tensor:
        return self._files.like(name + self._suffix)

    def _stored(self, name: str) -> Tensor:
        return self._files.tensor(name + self._suffix)
