"""A plain model directory from a checkpoint: no model in memory, no GPU, one weight at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint import layout
from losia_dist.checkpoint.atomic_files import Entry
from losia_dist.checkpoint.reader import Reader, layout_of
from losia_dist.export.model_directory import write_json_files, write_model_directory
from losia_dist.export.plain_class import stored_form_of
from losia_dist.export.requantized import Requantized, flat_blocks
from losia_dist.export.stored_form import StoredWeights


class ExportedWeights:
    """The weights that a checkpoint's model computes with, under the names of a plain model's files.

    Args:
        base_model, onto: of a run over a quantized base, as for `Requantized`.

    Raises:
        CheckpointError: files that are missing or damaged, or a model that is stored in another form than it has in memory, by
            rules that cannot be found again (`stored_form_of`).
    """

    def __init__(self, checkpoint: str | Path, base_model: str | Path | None = None, *, onto: bool = False) -> None:
        self.reader = Reader(layout.locate(checkpoint))
        self.reader.check_files(0, 1)
        base, manifest = self.reader.base, self.reader.manifest
        subnets = {f"{site}.subnet" for site in manifest["subnets"]}
        trained = {name: entry for name, entry in manifest["trained"].items() if name not in subnets}
        self.quantized = Requantized(self.reader, base_model, onto=onto)
        layers = {name: self.quantized.layers[layer] for name, layer in self.quantized.layer_of.items()}
        held = {**base["weights"], **layers, **trained, **manifest["buffers"]}
        self.entries = {name: Entry(getattr(torch, e["dtype"]), tuple(e["shape"])) for name, e in held.items()}
        self._alias: dict[str, str] = {}
        if base["config"] is None:
            # A plain torch module's state dict has every name; Transformers ties shared weights by itself.
            self._alias = {alias: name for alias, name in base["aliases"].items() if name in self.entries}
            self.entries |= {alias: self.entries[name] for alias, name in self._alias.items()}
        self._stored: StoredWeights | None = None
        if base["renamed_on_disk"]:
            self._form = stored_form_of(self.reader, self.entries)
            self._stored = StoredWeights(self._form, self._read)
            self.entries = self._stored.entries

    @property
    def texts(self) -> dict[str, Any]:
        """Configuration files: name -> JSON content, or None where the model has none."""
        return {"config.json": self.reader.base["config"], "generation_config.json": self.reader.base["generation_config"]}

    def read(self, name: str) -> Tensor:
        """One weight, whole, on the CPU, in the dtype and shape of its entry (a target layer's [m, n] or [n, m], as stored).

        Each is read once, in the order of `entries`: several may be made of one.
        """
        return self._read(name) if self._stored is None else self._stored.read(name)()

    def source_of(self, name: str) -> str | None:
        """The model's weight that a stored one is, maybe under another name; None where it is computed from one or several."""
        if self._stored is None:
            return name
        part = self._form.part_of[name]
        return None if part.is_computed else part.sources[0]

    def _read(self, name: str) -> Tensor:
        name = self._alias.get(name, name)
        if name in self.quantized.layer_of:
            return self.quantized.read(self.quantized.layer_of[name])
        if name in self.reader.base["weights"]:
            return self.reader.weight(name, with_subnet=True)
        return self.reader.model_copy(name) if name in self.reader.manifest["trained"] else self.reader.tensor(f"buffer/{name}")

    def blocks(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Places of a weight, as it is stored, that subnets were in since the base: (first index, second index) each.

        int64 on the CPU: [r] and [c], or [c] and [r] where the weight is stored [n, m]; of several matrices one each, in the
        weight as two dimensions, with the matrices under each other.
        """
        found: list[tuple[Tensor, Tensor]] = []
        name = self._alias.get(name, name)
        if name in self.quantized.layer_of:
            return self.quantized.blocks(self.quantized.layer_of[name])
        for site, entry in self.reader.manifest["subnets"].items():
            if entry["weight"] == name:
                stored = tuple(self.reader.base["weights"][name]["shape"])
                for rows, columns, _ in self.reader.blocks(site, with_subnet=True):
                    found += flat_blocks(stored, layout_of(entry).places(stored, rows, columns))
        return found


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    base_model: str | Path | None = None,
    tokenizer: Any = None,
    onto: bool = False,
) -> Path:
    """Write the model of a checkpoint as a plain directory. Called by one process.

    Args:
        checkpoint: a directory that was saved to (its newest complete checkpoint), or one step's directory in it.
        directory: made if missing; files of the same name are replaced only after all were written.
        base_model, tokenizer, onto: as for `export_model`.

    Raises:
        CheckpointError: see `ExportedWeights`; or not enough space.
        ConfigError: a write failed; the directory is as it was.
    """
    weights = ExportedWeights(checkpoint, base_model, onto=onto)
    return write_model_directory(
        directory,
        weights.entries,
        lambda name: lambda: weights.read(name),
        partial(write_json_files, weights.texts),
        base_model=base_model,
        tokenizer=tokenizer,
    )
