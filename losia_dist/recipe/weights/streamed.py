"""A model's weights as a source that gives any range of any parameter: what a rank keeps, and no more, is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.errors import ConfigError, some
from losia_dist.export.loaded_form import Conversion
from losia_dist.recipe.weights.empty import Where
from losia_dist.recipe.weights.model_files import ReadWhole
from losia_dist.recipe.weights.renaming import match_names
from losia_dist.recipe.weights.stored import StoredTensor


class StreamedWeights:
    """Where every parameter of a model comes from. Each rank has its own; nothing in here communicates.

    Args:
        model: a Transformers model, weights tied, before subnets are made; it may be on the meta device.
        stored: from `find_weights`.

    Raises:
        ReadWhole: a conversion that cannot be worked out without the values.
        ConfigError: a parameter that no stored tensor fills, or one of another shape.
    """

    def __init__(self, model: Any, stored: dict[str, StoredTensor]) -> None:
        self.model, self._stored = model, stored
        naming = match_names(model, list(stored))
        self.left_over = naming.left_over
        self._made: dict[str, Conversion] = {}
        self._latest: tuple[Conversion | None, dict[str, Tensor]] = (None, {})
        shapes: dict[str, tuple[int, ...]] = {name: stored[source].shape for name, source in naming.direct.items()}
        for conversion in naming.conversions:
            try:
                targets = conversion.run(model, lambda name: stored[name].like())
            except Exception as error:  # whatever a rule of Transformers raises on tensors without values
                raise ReadWhole(f"has {conversion.key} made from others by a rule that needs their values ({error})") from error
            self._made |= dict.fromkeys(targets, conversion)
            shapes |= {name: tuple(values.shape) for name, values in targets.items()}
        self._direct = {name: stored[source] for name, source in naming.direct.items()}
        self._source_of = self._sources(model, shapes)

    def name_of(self, tensor: Tensor) -> str | None:
        """Name that a parameter or persistent buffer of the model is read under; None: it keeps the value it has."""
        return self._source_of.get(id(tensor))

    def fill(self, places: Iterable[Where], own_range: Callable[[Tensor], tuple[Tensor, int]]) -> None:
        """Read this rank's part of everything that `give_memory` made for the model.

        Args:
            places: as `give_memory` gave them.
            own_range: what this rank keeps of a tensor, flat, and where in the whole it begins.

        Raises:
            ConfigError: a file that cannot be read.
        """
        for old, kept, name in places:
            source = self._source_of.get(old)
            if source is not None:
                self.read(source, *own_range(kept[name]))
        self._latest = (None, {})

    def read(self, name: str, target: Tensor, start: int) -> None:
        """Elements [start, start + target.numel()) of a whole parameter, flat and row-major, into a flat tensor.

        Cast to the target's dtype, on its device. A parameter that is made from other tensors is made whole, and kept until
        one of another group is asked for: its group is the most that is held beyond the target.

        Raises:
            ConfigError: a file that cannot be read.
        """
        with torch.no_grad():
            if name in self._direct:
                self._direct[name].read_into(target, start)
                return
            conversion = self._made[name]
            if self._latest[0] is not conversion:
                self._latest = (None, {})  # before the next is made, so that only one is held
                self._latest = (conversion, conversion.run(self.model, lambda source: self._stored[source].read()))
            values = self._latest[1][name].reshape(-1)
            target.copy_(values[start : start + target.numel()])

    def fingerprint(self) -> dict[str, list[int]]:
        """Numbers of each file that must be equal on every machine, since each rank takes its part from its own copy."""
        files = {id(tensor.file): tensor.file for tensor in self._stored.values()}
        return {file.path.name: file.fingerprint() for file in files.values()}

    def _sources(self, model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[int, str]:
        """For every parameter the name it is stored under: its own, or another one of a shared parameter."""
        names: dict[int, list[str]] = {}
        whole: dict[int, Tensor] = {}
        for name, tensor in _stored_entries(model):
            names.setdefault(id(tensor), []).append(name)
            whole[id(tensor)] = tensor
        found, lost = {}, []
        for key, tensor in whole.items():
            there = [name for name in names[key] if name in shapes]
            for name in there:
                if shapes[name] != tuple(tensor.shape):
                    raise ConfigError(
                        f"{name} is {list(shapes[name])} in the model's files and {list(tensor.shape)} by its configuration: "
                        "config.json and the weights are not of one model. Download or copy both again."
                    )
            for other in there[1:]:
                self._refuse_untied(there[0], other)
            if there:
                found[key] = there[0]
            elif isinstance(tensor, nn.Parameter):
                lost.append(names[key][0])
        if lost:
            raise ConfigError(missing_message(model, lost))
        return found

    def _refuse_untied(self, name: str, other: str) -> None:
        if name not in self._direct or other not in self._direct:
            return
        one, two = (self._direct[each] for each in (name, other))
        piece = 1 << 22
        total = one.like().numel()
        for start in range(0, total, piece):
            pieces = [torch.empty(min(piece, total - start), dtype=source.dtype) for source in (one, two)]
            for source, values in zip((one, two), pieces, strict=True):
                source.read_into(values, start)
            if not torch.equal(*pieces):
                raise ConfigError(
                    f"the model's configuration ties {name} and {other}, and its files hold different values for them. Set "
                    '"tie_word_embeddings": false in config.json, or remove one of the two from the files.'
                )


def missing_message(model: Any, lost: list[str]) -> str:
    """What is said of parameters that no file holds, however a model is loaded."""
    return (
        f"the model's files hold no values for {some(lost, 1)} of {type(model).__name__}: it would train from random numbers. "
        "Give files of the whole model, or a configuration that fits them."
    )


def _stored_entries(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Every name of every parameter and persistent buffer, those of shared ones included."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
