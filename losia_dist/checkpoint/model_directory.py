"""Plain model directories (safetensors, config, tokenizer), read and written one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from losia_dist.checkpoint import files
from losia_dist.errors import CheckpointError

SHARD_BYTES = 5_000_000_000
_BESIDE_WEIGHTS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)


class ModelDirectory:
    """Weights of a plain model directory, by name, mapped from the files when they are asked for.

    Raises:
        CheckpointError: no safetensors weights there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            names = {"model.safetensors"}
        try:
            handles = [safe_open(str(self.path / name), framework="pt", device="cpu") for name in sorted(names)]
        except Exception as error:  # the library raises errors of its own kind
            raise CheckpointError(f"{self.path} has no model weights in safetensors files that can be read: {error}") from error
        self._where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dictionary)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def tensor(self, name: str) -> Tensor:
        """A weight, whole, as it is stored."""
        return self._where[name].get_tensor(name)  # type: ignore[no-any-return]


def write_model_directory(
    directory: str | Path,
    entries: dict[str, files.Entry],
    read: Callable[[str], Tensor],
    *,
    texts: dict[str, Any],
    base_model: str | Path | None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write weights in files of at most `shard_bytes` (a larger tensor gets a file of its own), one in memory at a time.

    Args:
        directory: made if missing; its files of the same names are replaced only after all were written.
        entries: every weight that there will be.
        read: gives a weight when its turn comes.
        texts: file name -> JSON content, or None to leave it out.
        base_model: a directory whose tokenizer files are copied.

    Raises:
        CheckpointError: not enough space, or `base_model` is not a directory.
        OSError: a write failed; the directory is as it was.
    """
    directory = Path(directory).absolute()
    if base_model is not None and not Path(base_model).is_dir():
        raise CheckpointError(
            f"base_model={str(base_model)!r} is not a directory: give a local model directory, or leave it out."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    files.check_space(directory.parent, sum(entry.size for entry in entries.values()))
    beside = directory.with_name(f".{directory.name}.incomplete")
    files.remove(beside)
    beside.mkdir()
    try:
        shards = _shards(entries, shard_bytes)
        places = {}
        for place, shard in enumerate(shards):
            many = len(shards) > 1
            name = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
            writer = files.TensorWriter(beside / name, shard, {"format": "pt"})
            try:
                for weight in writer.order:
                    writer.write(weight, read(weight))
                    places[weight] = name
                writer.close()
            finally:
                writer.abandon()
        if len(shards) > 1:
            total = sum(entry.size for entry in entries.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            files.write_text(beside / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        for name, content in texts.items():
            if content is not None:
                files.write_text(beside / name, json.dumps(content, indent=2) + "\n")
        if base_model is not None:
            copy_tokenizer(base_model, beside)
        directory.mkdir(exist_ok=True)
        for path in beside.iterdir():
            os.replace(path, directory / path.name)
        files.sync_directory(directory)
    finally:
        files.remove(beside)
    return directory


def copy_tokenizer(base_model: str | Path, directory: Path) -> None:
    """Copy what a model needs besides weights and config."""
    for pattern in _BESIDE_WEIGHTS:
        for path in Path(base_model).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)


def _shards(entries: dict[str, files.Entry], limit: int) -> list[dict[str, files.Entry]]:
    shards: list[dict[str, files.Entry]] = [{}]
    used = 0
    for name, entry in entries.items():
        if shards[-1] and used + entry.size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = entry
        used += entry.size
    return shards
