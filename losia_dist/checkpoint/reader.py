"""A complete checkpoint on disk, read a tensor at a time: no model, no ranks, no GPU needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from losia_dist.checkpoint import layout, values
from losia_dist.errors import CheckpointError
from losia_dist.subnet.layout import Layout

_FILES_OPEN = 128


class Reader:
    """Opens a checkpoint's manifest; tensors are mapped from the files when they are asked for.

    Args:
        complete: from `layout.find`.

    Raises:
        CheckpointError: a manifest that is missing, damaged, foreign or of a newer format.
    """

    def __init__(self, complete: layout.Complete) -> None:
        self.path, self.directory = complete.path, complete.path.parent
        self.manifest = layout.read_manifest(complete.path, complete.manifest_crc32)
        self.base: dict[str, Any] = layout.read_manifest(self.directory / layout.BASE, self.manifest["base_crc32"])
        self._open: dict[str, Any] = {}

    def check_files(self, rank: int, world_size: int) -> None:
        """All files are there in their sizes; checksums of every `world_size`-th of them.

        Raises:
            CheckpointError: the first one that is not.
        """
        records = {**self.base["files"], **self.manifest["journal"]}
        own = {f"{self.path.name}/{name}": record for name, record in self.manifest["files"].items()}
        layout.check_files(self.directory, {**records, **own}, slice(rank, None, world_size))

    def tensor(self, name: str) -> Tensor:
        """A tensor of the step's own files: on the CPU, whole, in the dtype that it was saved in."""
        return self._file(self._places[name]).get_tensor(name)  # type: ignore[no-any-return]

    def state(self, name: str) -> dict[str, Tensor]:
        """Optimizer state of a parameter, on the CPU: `StateAccess.read_state`'s entries, whole (a subnet's [r, c]) or []."""
        prefix = f"state/{name}/"
        return {key.removeprefix(prefix): self.tensor(key) for key in self._places if key.startswith(prefix)}

    def importance(self, site: str, kind: str) -> list[tuple[int, Any]]:
        """(first row, slice of [rows, n] fp32 that is read when indexed) of a layer's averages; none at a slot's start."""
        prefix, suffix = f"importance/{site}/", f"/{kind}"
        return [
            (int(name[len(prefix) : -len(suffix)]), self._file(file).get_slice(name))
            for name, file in self._places.items()
            if name.startswith(prefix) and name.endswith(suffix)
        ]

    def weight(self, name: str, with_subnet: bool) -> Tensor:
        """A weight that does not train, whole, in its dtype: base, then the journal in order, then (asked for) the subnet.

        On the CPU, as it is stored: a target layer's [m, n] or [n, m].
        """
        tensor: Tensor = self._file(f"{layout.BASE}/{self.base['weights'][name]['file']}").get_tensor(name)
        sites = {site: entry for site, entry in self.manifest["subnets"].items() if entry["weight"] == name}
        is_mapped = True
        for site, entry in sites.items():
            for rows, columns, block in self.blocks(site, with_subnet):
                if is_mapped:
                    tensor, is_mapped = tensor.clone(), False  # what is mapped from a file is not written to
                tensor[layout_of(entry).places(tuple(tensor.shape), rows, columns)] = block.to(tensor.dtype)
        return tensor

    def blocks(self, site: str, with_subnet: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(rows, columns, values) of what was written into a layer's weight since the base, in order.

        On the CPU: int64 [r], int64 [c], and [r, c] in the weight's dtype, the subnet's in its own; rows are output neurons. Of
        experts [X, r], [X, c] and [X, r, c].
        """
        found = []
        for file, prefix in self._journal.get(site, []):
            handle = self._file(file)
            found.append(tuple(handle.get_tensor(f"{prefix}/{part}") for part in ("rows", "columns", "values")))
        if with_subnet:
            value = self.model_copy(f"{site}.subnet")
            found.append((self.tensor(f"rows/{site}"), self.tensor(f"columns/{site}"), value))
        return found  # type: ignore[return-value]

    def numbered(self, prefix: str) -> Iterator[tuple[int, str, Tensor]]:
        """(number, part, tensor) of every tensor of the step's own that is called `<prefix><number>/<part>`."""
        for name in self._places:
            if name.startswith(prefix):
                number, _, part = name[len(prefix) :].partition("/")
                yield int(number), part, self.tensor(name)

    def model_copy(self, name: str) -> Tensor:
        """A trained parameter as the model computes with it: its saved value in the parameter's dtype, [r, c] of a subnet."""
        dtype: torch.dtype = getattr(torch, self.manifest["trained"][name]["dtype"])
        return self.tensor(f"state/{name}/value").to(dtype)

    def values(self) -> dict[str, Any]:
        """The saved plain values, tensors put back into them."""
        names = [name for name in self._places if name.startswith("value/")]
        tensors = {name: self.tensor(name) for name in names}
        return {name: values.decode(value, tensors) for name, value in self.manifest["values"].items()}

    def random_state(self, rank: int) -> dict[str, Any]:
        """Random states of one of the saved ranks."""
        handle = self._file(f"{self.path.name}/{state_file(rank)}")
        names = [name for name in handle.keys() if name.startswith("random/")]  # noqa: SIM118 (not a dictionary)
        decoded = values.decode(json.loads(handle.metadata()["random"]), {name: handle.get_tensor(name) for name in names})
        return dict(decoded)

    @cached_property
    def _places(self) -> dict[str, str]:
        """Tensor -> file of the step that holds it."""
        files = [f"{self.path.name}/{file}" for file in self.manifest["files"]]
        return {name: file for file in files for name in self._file(file).keys() if not name.startswith("random/")}  # noqa: SIM118

    @cached_property
    def _journal(self) -> dict[str, list[tuple[str, str]]]:
        """Layer -> its journal entries, as (file, prefix of their names), in order."""
        found: dict[str, list[tuple[str, str]]] = {}
        for file in self.manifest["journal"]:
            entries = {key.rpartition("/")[0] for key in self._file(file).keys()}  # noqa: SIM118
            for prefix in sorted(entries, key=lambda prefix: int(prefix.partition("/")[0])):
                found.setdefault(prefix.partition("/")[2], []).append((file, prefix))
        return found

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= _FILES_OPEN:  # a long run's journal has more files than a process may hold open
                self._open.pop(next(iter(self._open)))
            try:
                self._open[name] = safe_open(str(self.directory / name), framework="pt", device="cpu")
            except Exception as error:  # the library raises errors of its own kind
                raise CheckpointError(
                    f"{self.directory / name} cannot be read: {error}. Restore it, or load another step."
                ) from error
        return self._open[name]


def layout_of(entry: dict[str, Any]) -> Layout:
    """How the weight of a subnet in a step's manifest stores its matrices."""
    experts = entry.get("experts")
    return Layout(entry["transposed"], None if experts is None else tuple(experts), entry.get("stacked", 0))


def state_file(rank: int) -> str:
    """Name of the file that a rank writes into a step's directory."""
    return f"state-{rank:05d}.safetensors"
