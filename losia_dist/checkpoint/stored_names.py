"""The rules by which Transformers stores a model's weights under other names, or in another form, than they have in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.fsdp import FSDPModule


def conversions_of(model: Any) -> list[Any]:
    """Transformers' rules that saving this model reverses, in their order; none where files hold what is in memory.

    A model that was read from files keeps those that reading used; any other has those of its class.
    """
    noted = getattr(model, "_weight_conversions", None)
    if noted is not None:
        return list(noted)
    if not hasattr(model, "save_pretrained"):
        return []
    return [rule for rule in class_conversions(model, add_legacy=False) if not _guesses_a_prefix(rule)]


def class_conversions(model: Any, add_legacy: bool) -> list[Any]:
    """The rules of the model's class and those of its parts; add_legacy: also those that only old files need."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    with plain_classes(model):
        return list(get_model_conversion_mapping(model, add_legacy=add_legacy))


@contextmanager
def plain_classes(model: Any) -> Iterator[None]:
    """Let modules be of their own classes for a while, and not of FSDP2's for them: Transformers finds its rules by a name."""
    wrapped: list[tuple[Any, type]] = [(module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module, kind in wrapped:
            module.__class__ = next(own for own in kind.__mro__ if not issubclass(own, FSDPModule))
        yield
    finally:
        for module, kind in wrapped:
            module.__class__ = kind


def describe_conversion(rule: Any) -> list[Any]:
    """What tells a rule from the others of its model, as JSON values: kind, patterns, and the part that it is for.

    The same after the rule was reversed, in which Transformers moves anchors and groups between its patterns' two sides.
    """
    sides = [getattr(rule, f"_original_{side}", None) or getattr(rule, side) for side in ("source_patterns", "target_patterns")]
    patterns = [[_bare(pattern) for pattern in ([side] if isinstance(side, str) else side)] for side in sides]
    return [type(rule).__name__, *patterns, getattr(rule, "scope_prefix", None), getattr(rule, "base_model_prefix", None)]


def _bare(pattern: str) -> str:
    """The names in a pattern: without groups, references to them, anchors and escapes."""
    left = pattern.replace("\\1", "")
    while (outer := re.sub(r"\([^()]*\)", "", left)) != left:  # the innermost first
        left = outer
    return re.sub(r"[\^$\\]", "", left)


def _guesses_a_prefix(rule: Any) -> bool:
    """Transformers reverses these only where reading used them: nothing else tells whether the files had the prefix."""
    return type(rule).__name__ == "PrefixChange"
