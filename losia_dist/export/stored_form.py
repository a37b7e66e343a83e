"""What Transformers stores of a model's weights: under which names, in which form, and which weights it takes together.

Its own rules are run to find out, on tensors without data. Where they only rename, a weight stays one; where they compute
(experts that are one tensor in memory and many in the files), weights form parts, as small as the rules let them be.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from losia_dist.checkpoint.safetensors_io import Entry
from losia_dist.checkpoint.stored_names import plain_classes

Made = dict[str, Entry]


@dataclass(frozen=True, eq=False)
class Part:
    """Weights that are stored together.

    Attributes:
        sources: their names in the model.
        stored: what the files hold of them.
        is_computed: whether a rule computes it; if not, it is the one source under another name, or its own.
    """

    sources: tuple[str, ...]
    stored: Made
    is_computed: bool


class StoredForm:
    """The stored form of a model's weights. No weight is touched, and nothing is communicated.

    Args:
        model: gives configuration and class; its parameters may be sharded, or without data.
        entries: the weights that are saved, by their names in the model, with their whole shapes.
        conversions: Transformers' rules (`conversions_of`).

    Raises:
        Exception, of any kind: this release of Transformers keeps its rules elsewhere, or they do not take these weights.
    """

    def __init__(self, model: Any, entries: Made, conversions: list[Any]) -> None:
        left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        entries = {name: entry for name, entry in entries.items() if name not in left_out}
        self._model = _Described(model, entries, conversions)
        self._entries = entries
        self._delays_copies = True
        empty = {name: _empty(entry) for name, entry in entries.items()}
        try:
            whole = self._reverse(empty)
        except RuntimeError:  # a rule takes a view that only a copy allows
            self._delays_copies = False
            whole = self._reverse(empty)
        if getattr(model, "_weight_conversions", None) is None:
            with plain_classes(model):
                by_class = self._reverse(empty, _Described(model, entries))
            if _entries_of(whole) != _entries_of(by_class):
                raise ValueError("this release of Transformers chooses a model's rules in another way")
        self.parts = sorted(self._find_parts(empty, whole), key=lambda part: _natural(part.sources[0]))
        part_of = {name: part for part in self.parts for name in part.stored}
        # The order of a file (wider types first) in all of them: a part's tensors then follow each other.
        order = sorted(part_of, key=lambda name: -part_of[name].stored[name].dtype.itemsize)
        self.part_of = {name: part_of[name] for name in order}
        self.entries: Made = {name: part.stored[name] for name, part in self.part_of.items()}

    def convert(self, part: Part, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored name -> tensor, of a part's sources as they are in memory: views of those where the rules allow it."""
        if not part.is_computed:
            return dict(zip(part.stored, tensors.values(), strict=True))
        return self._reverse({name: tensor.contiguous() for name, tensor in tensors.items()})

    def _find_parts(self, empty: dict[str, Tensor], whole: dict[str, Tensor]) -> Iterator[Part]:
        name_of = {id(tensor): name for name, tensor in empty.items()}
        renamed = {name: name_of[id(tensor)] for name, tensor in whole.items() if id(tensor) in name_of}
        taken = set(renamed.values())
        for name, source in renamed.items():
            yield Part((source,), {name: self._entries[source]}, is_computed=False)
        computed = [name for name in empty if name not in taken]
        made = {name: entry for name, entry in _entries_of(whole).items() if name not in renamed}
        if computed:
            yield from self._cut(computed, made, 0)

    def _cut(self, names: list[str], made: Made, depth: int) -> Iterator[Part]:
        """The smallest sets of weights, by module, from which the rules make what they make of all."""
        if len(names) == 1:
            yield Part(tuple(names), made, is_computed=True)
            return
        inside: dict[str, list[str]] = {}
        while len(inside) < 2:
            depth, inside = depth + 1, {}
            for name in names:
                inside.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        found = {key: self._made_of(members) for key, members in inside.items()}
        alone = [key for key, theirs in found.items() if theirs and theirs.items() <= made.items()]
        together = [name for key, members in inside.items() if key not in alone for name in members]
        pieces = [found[key] for key in alone] + ([self._made_of(together)] if together else [])
        if sum(len(piece) for piece in pieces) != len(made) or {k: v for piece in pieces for k, v in piece.items()} != made:
            yield Part(tuple(names), made, is_computed=True)
            return
        for key in alone:
            yield from self._cut(inside[key], found[key], depth)
        if together:
            yield Part(tuple(together), pieces[-1], is_computed=True)

    def _made_of(self, names: list[str]) -> Made:
        """What the rules make of some weights alone; nothing where they need others too."""
        try:
            return _entries_of(self._reverse({name: _empty(self._entries[name]) for name in names}))
        except Exception:  # the rules' own, of any kind: a pattern or a tensor that is not there
            return {}

    def _reverse(self, tensors: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        if not self._delays_copies:
            return revert_weight_conversion(model or self._model, dict(tensors))
        with _DelayedCopies():
            return revert_weight_conversion(model or self._model, dict(tensors))


class _Described:
    """A model to Transformers' rules, whose parameters have their whole shapes wherever an engine keeps them.

    conversions: the rules that are reversed; None: Transformers chooses them for the model.
    """

    def __init__(self, model: Any, entries: Made, conversions: list[Any] | None = None) -> None:
        self._of, self._shapes, self._conversions = model, entries, conversions

    @property
    def _weight_conversions(self) -> list[Any] | None:
        """Each time anew: reversing a rule changes its patterns."""
        return copy.deepcopy(self._conversions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def get_parameter(self, name: str) -> Tensor:
        """Without data."""
        if name not in self._shapes:
            raise AttributeError(name)
        return _empty(self._shapes[name])


class _DelayedCopies(TorchFunctionMode):
    """A tensor that is made contiguous stays as it is: each is copied when it is written, and not all at once."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.contiguous:
            return args[0]
        return function(*args, **(kwargs or {}))


class StoredWeights:
    """Weights in their stored form, read in the order of `entries`; the sources of one part are in memory at a time.

    Args:
        read: gives a weight, whole, by its name in the model; called on all ranks, each with the same names in the same order.
        keeps: whether this rank writes, or reads along for the others.
    """

    def __init__(self, form: StoredForm, read: Callable[[str], Tensor], keeps: bool = True) -> None:
        self.entries = form.entries
        self._form, self._read, self._keeps = form, read, keeps
        self._part: Part | None = None
        self._sources: dict[str, Tensor] = {}
        self._made: dict[str, Tensor] | None = None

    def read(self, name: str) -> Callable[[], Tensor]:
        """Read along with the other ranks what a stored weight is made of; what comes back makes it, on the CPU, once."""
        part = self._form.part_of[name]
        if part is not self._part:
            self._part, self._sources, self._made = part, {}, None
            for source in part.sources:
                whole = self._read(source)
                if self._keeps:
                    self._sources[source] = whole.cpu()
                del whole
        return lambda: self._make(name)

    def _make(self, name: str) -> Tensor:
        assert self._part is not None
        if self._made is None:
            self._made = self._form.convert(self._part, self._sources)
            self._sources = {}
        made = self._made.pop(name)
        if not self._made:
            self._part = None
        return made


def _entries_of(tensors: dict[str, Tensor]) -> Made:
    return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _empty(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    pieces: Iterable[str] = re.split(r"(\d+)", name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]
