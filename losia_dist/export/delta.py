"""A compact file of what training changed in a model, and the model rebuilt from base and delta, bit for bit.

Per changed weight the smallest of three forms: blocks (first index x second index, values) where subnets were, with single
elements for whatever else differs; single elements alone; or the whole weight.
"""

from __future__ import annotations

import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from losia_dist.checkpoint import atomic_files, layout
from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.safetensors_io import dtype_name
from losia_dist.errors import CheckpointError
from losia_dist.export.model_directory import ModelDirectory, write_json_files, write_model_directory
from losia_dist.export.offline import ExportedWeights

FORMAT = 1
_KIND = "losia_dist delta"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_delta(checkpoint: str | Path, file: str | Path, base_model: str | Path) -> Path:
    """Write what differs between a checkpoint's model and the model it was fine-tuned from. Called by one process.

    One weight is compared at a time; the delta itself is held in host memory until it is written. Of a run over a quantized
    base it is what training changed, onto the original weights.

    Args:
        checkpoint: as for `export_model`.
        file: the delta, in safetensors format; replaced if it is there.
        base_model: directory with the base model's safetensors. Weights of another dtype are compared after casting.

    Raises:
        CheckpointError: a checkpoint or base that cannot be read.
    """
    quantized = bool(Reader(layout.locate(checkpoint)).manifest.get("quantized"))
    weights, base, file = ExportedWeights(checkpoint, base_model, onto=quantized), ModelDirectory(base_model), Path(file)
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, entry in weights.entries.items():
        tuned = weights.read(name)
        described[name] = {"dtype": dtype_name(entry.dtype), "shape": list(entry.shape), "base": None}
        if name not in base or tuple(base.tensor(name).shape) != entry.shape:
            tensors[f"{name}/whole"] = tuned.clone()  # it may be a view of something larger
            continue
        original = base.tensor(name)
        described[name]["base"] = _fingerprint(original)
        source = weights.source_of(name)
        blocks = weights.blocks(source) if source is not None else None
        tensors |= {f"{name}/{part}": tensor for part, tensor in _difference(original, tuned, blocks).items()}
    header = {"kind": _KIND, "format": FORMAT, "weights": described, "texts": weights.texts}
    beside = file.with_name(f".{file.name}.incomplete")
    atomic_files.remove(beside)
    atomic_files.check_space(file.absolute().parent, sum(t.nbytes for t in tensors.values()))
    try:
        atomic_files.write_tensors(
            beside, {name: t.contiguous() for name, t in tensors.items()}, {"losia_delta": json.dumps(header)}
        )
        beside.replace(file)
    finally:
        atomic_files.remove(beside)
    return file


def apply_delta(file: str | Path, base_model: str | Path, directory: str | Path) -> Path:
    """Rebuild the fine-tuned model from its base and a delta: the same bits as `export_model` wrote. Called by one process.

    Args:
        file: what `save_delta` wrote.
        base_model: directory of the same base model; every weight that is used is checked against the delta's fingerprints.
        directory: as for `export_model`; all of the base but its weights is copied.

    Raises:
        CheckpointError: not a delta, of a newer format, or another base model.
    """
    try:
        handle = safe_open(str(file), framework="pt", device="cpu")
        header = json.loads((handle.metadata() or {})["losia_delta"])
    except Exception as error:  # the library raises errors of its own kind
        raise CheckpointError(f"{file} is not a delta of this package, or it is damaged: {error}") from error
    if header.get("kind") != _KIND or header["format"] > FORMAT:
        raise CheckpointError(f"{file} has delta format {header.get('format')}; this version reads up to {FORMAT}. Upgrade it.")
    base, described = ModelDirectory(base_model), header["weights"]
    parts: dict[str, list[str]] = {}
    for key in handle.keys():  # noqa: SIM118 (not a dictionary)
        name = next(name for name in _prefixes(key) if name in described)
        parts.setdefault(name, []).append(key.removeprefix(f"{name}/"))

    def read(name: str) -> Tensor:
        entry, found = described[name], {part: handle.get_tensor(f"{name}/{part}") for part in parts.get(name, [])}
        if entry["base"] is None:
            return found["whole"]
        if name not in base or _fingerprint(base.tensor(name)) != entry["base"]:
            raise CheckpointError(
                f"{base_model} is not the model that {file} was made from: its weight {name!r} is missing or differs. Give the "
                "directory of the very base model that was fine-tuned."
            )
        return _patched(base.tensor(name).to(getattr(torch, entry["dtype"])), found)

    entries = {name: atomic_files.Entry(getattr(torch, e["dtype"]), tuple(e["shape"])) for name, e in described.items()}
    return write_model_directory(directory, entries, read, partial(write_json_files, header["texts"]), base_model=base_model)


def _difference(original: Tensor, tuned: Tensor, blocks: list[tuple[Tensor, Tensor]] | None) -> dict[str, Tensor]:
    """The parts that turn `original` into `tuned`; none where they are equal bit for bit.

    blocks: where subnets were, first and second index; None: not known in the form in which this weight is stored.
    """
    bits = _BITS[tuned.element_size()]
    if not tuned.dim():
        return {"whole": tuned}
    differs = original.to(tuned.dtype).contiguous().view(bits) != tuned.contiguous().view(bits)
    count = int(differs.sum())
    if not count:
        return {}
    if blocks is None:  # all rows and columns with a difference: where one subnet was, these are its own
        blocks = [(differs.any(1).nonzero().reshape(-1), differs.any(0).nonzero().reshape(-1))] if tuned.dim() == 2 else []
    index, size = torch.int32 if tuned.numel() < 2**31 else torch.int64, tuned.element_size()
    rest, flat = differs.clone(), (-1, tuned.shape[-1])
    for first, second in blocks:
        rest.view(flat)[first[:, None], second[None, :]] = False
    cost = sum(4 * (first.numel() + second.numel()) + first.numel() * second.numel() * size for first, second in blocks)
    single, left = index.itemsize + size, int(rest.sum())
    if count * single < cost + left * single:
        blocks, rest, cost, left = [], differs, 0, count
    if tuned.numel() * size < cost + left * single:
        return {"whole": tuned.clone()}  # it may be a view of something larger
    places = rest.reshape(-1).nonzero().reshape(-1)
    found: dict[str, Tensor] = {}
    for place, (first, second) in enumerate(blocks):
        found[f"{place}/first"], found[f"{place}/second"] = first.to(torch.int32), second.to(torch.int32)
        found[f"{place}/values"] = tuned.view(flat)[first[:, None], second[None, :]]
    if places.numel():
        found |= {"places": places.to(index), "values": tuned.reshape(-1)[places]}
    return found


def _patched(tensor: Tensor, found: dict[str, Tensor]) -> Tensor:
    if "whole" in found:
        return found["whole"]
    if not found:
        return tensor
    tensor = tensor.clone()
    place = 0
    while f"{place}/values" in found:
        first, second = found[f"{place}/first"].long(), found[f"{place}/second"].long()
        tensor.view(-1, tensor.shape[-1])[first[:, None], second[None, :]] = found[f"{place}/values"]
        place += 1
    if "places" in found:
        tensor.view(-1)[found["places"].long()] = found["values"]
    return tensor


def _fingerprint(tensor: Tensor) -> list[Any]:
    """Dtype and CRC-32 of a weight as it is stored."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return [dtype_name(tensor.dtype), zlib.crc32(memoryview(data))]


def _prefixes(key: str) -> list[str]:
    pieces = key.split("/")
    return ["/".join(pieces[:count]) for count in range(len(pieces) - 1, 0, -1)]
