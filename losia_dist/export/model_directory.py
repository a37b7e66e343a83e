"""Plain model directories (safetensors, config, tokenizer), read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from losia_dist.checkpoint import atomic_files
from losia_dist.checkpoint.safetensors_io import DTYPES, writing_order
from losia_dist.errors import CheckpointError, ConfigError, LoSiAError
from losia_dist.export.beside import TEMPLATES, copy_beside
from losia_dist.export.inference import TOKENIZERS, add_end_tokens, write_tokenizer
from losia_dist.export.weight_files import INDEX, WEIGHTS, weight_map
from losia_dist.ranks.agreement import Agreement

Read = Callable[[str], "Tensor | Callable[[], Tensor]"]
SHARD_BYTES = 5_000_000_000
_ADAPTER = "adapter_config.json"  # from_pretrained takes it for PEFT's, and loads it on top
# What from_pretrained looks for, in one file or several; no other name (model_ema.safetensors) is touched.
_WEIGHTS = tuple(
    pattern
    for name, end in (("model", "safetensors"), ("pytorch_model", "bin"))
    for pattern in (f"{name}.{end}", f"{name}-[0-9]*-of-[0-9]*.{end}", f"{name}.{end}.index.json")
)


class ModelDirectory:
    """Weights of a plain model directory, by name, mapped from the files when they are asked for.

    Raises:
        CheckpointError: no safetensors weights there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            names = set(weight_map(self.path).values())
            handles = [safe_open(str(self.path / name), framework="pt", device="cpu") for name in sorted(names)]
        except Exception as error:  # the library raises errors of its own kind
            raise CheckpointError(f"{self.path} has no model weights in safetensors files that can be read: {error}") from error
        self._where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dictionary)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        """Of all weights."""
        return list(self._where)

    def like(self, name: str) -> Tensor:
        """A tensor without data, of a weight's shape and dtype."""
        part = self._where[name].get_slice(name)
        return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")

    def tensor(self, name: str) -> Tensor:
        """A weight, whole, in the shape and dtype that it is stored in, on the CPU."""
        return self._where[name].get_tensor(name)  # type: ignore[no-any-return]


def write_model_directory(
    directory: str | Path,
    entries: dict[str, atomic_files.Entry],
    read: Read,
    write_texts: Callable[[Path], None],
    *,
    base_model: str | Path | None = None,
    tokenizer: Any = None,
    agreement: Agreement | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write weights in files of at most `shard_bytes` (a larger tensor gets a file of its own), one in memory at a time.

    Called by all ranks of the agreement; rank 0 writes. Whatever fails on it is raised on all of them.

    Args:
        directory: made if missing; what is in it changes only after all was written. Weights it holds then that are not
            among the new ones are deleted: a loader would take them.
        entries: every weight that `read` gives, in the same order on all ranks.
        read: gives a weight when its turn comes; called on all ranks, so that it may communicate. It may give a function
            instead, which the rank that writes calls for the weight, and which must not communicate: it may fail there.
        write_texts: puts into the directory that it is given the model's configuration, and its code; called on rank 0, first.
        base_model: a directory of which all but the weights is copied (`copy_beside`).
        tokenizer: a tokenizer or processor that is written too, in the place of the base's.
        agreement: None: this process alone.

    Raises:
        CheckpointError: not enough space, or `base_model` is not a directory; the directory is as it was.
        ConfigError: a write failed, or `write_texts`; the directory is as it was.
    """
    agreement = agreement or Agreement(None)
    directory, shards = Path(directory).absolute(), _shards(entries, shard_bytes)
    writer: _DirectoryWriter | None = None
    failure: Exception | None = None

    def begin() -> None:
        nonlocal writer
        with _telling_where(directory):
            writer = _DirectoryWriter(directory, shards)
            writer.begin(write_texts, base_model, tokenizer)

    def complete() -> None:
        with _telling_where(directory):
            if failure is not None:
                raise failure
            if writer is not None:
                writer.complete()

    try:
        agreement.on_first(None, begin)
        for name in [name for shard in shards for name in shard]:
            whole = read(name)
            if writer is not None and failure is None:
                try:
                    writer.write(name, whole() if callable(whole) else whole)
                except Exception as error:  # the other ranks are in the middle of reading: tell them at the end of it
                    failure = error
                    if agreement.world_size == 1:
                        break
            del whole
        agreement.attempt(None, complete)
    finally:
        if writer is not None:
            writer.abandon()
    return directory


class _DirectoryWriter:
    """Writes into a directory beside the target, or inside one that exists; then everything takes its place."""

    def __init__(self, directory: Path, shards: list[dict[str, atomic_files.Entry]]) -> None:
        self._directory = directory
        self._is_new = not directory.exists()
        self._beside = directory.with_name(f".{directory.name}.incomplete") if self._is_new else directory / ".incomplete"
        self._shards = {_file_name(place, len(shards)): shard for place, shard in enumerate(shards)} if shards[0] else {}
        self._file_of = {weight: name for name, shard in self._shards.items() for weight in shard}
        self._size = sum(entry.size for shard in shards for entry in shard.values())
        self._name = ""
        self._file: atomic_files.TensorWriter | None = None

    def begin(self, write_texts: Callable[[Path], None], base_model: str | Path | None, tokenizer: Any) -> None:
        """Everything but the weights; and whether there is room for them."""
        if base_model is not None and not Path(base_model).is_dir():
            raise CheckpointError(
                f"base_model={str(base_model)!r} is not a directory: give a local model directory, or leave it out."
            )
        if isinstance(tokenizer, str | Path):
            raise ConfigError(
                f"tokenizer={str(tokenizer)!r} is a name: pass the tokenizer itself (AutoTokenizer.from_pretrained(...)), or "
                "the model's directory as base_model."
            )
        if (self._directory / _ADAPTER).exists():
            raise ConfigError(
                f"{self._directory} holds a PEFT adapter ({_ADAPTER}), which Transformers would load on top of this model: "
                "give another directory, or move the adapter away."
            )
        atomic_files.remove(self._beside)
        self._beside.mkdir(parents=True)
        atomic_files.check_space(self._beside, self._size)
        if base_model is not None:
            copy_beside(base_model, self._beside)
        write_texts(self._beside)
        if tokenizer is not None:
            write_tokenizer(tokenizer, self._beside)
        add_end_tokens(self._beside, tokenizer)

    def write(self, weight: str, tensor: Tensor) -> None:
        name = self._file_of[weight]
        if name != self._name:
            self._close()
            self._name, self._file = name, atomic_files.TensorWriter(self._beside / name, self._shards[name], {"format": "pt"})
        assert self._file is not None
        self._file.write(weight, tensor)

    def complete(self) -> None:
        self._close()
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self._size}, "weight_map": dict(sorted(self._file_of.items()))}
            atomic_files.write_text(self._beside / INDEX, json.dumps(index, indent=2) + "\n")
        if self._is_new:
            atomic_files.rename_directory(self._beside, self._directory)
            return
        new = {path.relative_to(self._beside) for path in self._beside.rglob("*") if path.is_file()}
        if any(path.name in TOKENIZERS for path in new):  # templates that the new tokenizer does not have
            atomic_files.remove(self._directory / TEMPLATES)
        for path in sorted(new):
            (self._directory / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._beside / path, self._directory / path)
        for old in {old for pattern in _WEIGHTS for old in self._directory.glob(pattern)}:
            if Path(old.name) not in new:
                old.unlink()
        atomic_files.sync_directory(self._directory)

    def abandon(self) -> None:
        """Leave nothing half-written behind; after `complete` there is nothing."""
        if self._file is not None:
            self._file.abandon()
        with contextlib.suppress(OSError):  # the error that led here is the one to raise
            atomic_files.remove(self._beside)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_json_files(contents: dict[str, Any], directory: Path) -> None:
    """Write files of JSON, sorted as Transformers sorts them: name -> content; None leaves one out."""
    for name, content in contents.items():
        if content is not None:
            atomic_files.write_text(directory / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _telling_where(directory: Path) -> Iterator[None]:
    try:
        yield
    except LoSiAError:
        raise
    except Exception as error:  # a model's own saving, too, may fail with any
        raise ConfigError(f"the model could not be written to {directory}: {type(error).__name__}: {error}") from error


def _file_name(place: int, count: int) -> str:
    return WEIGHTS if count == 1 else f"model-{place + 1:05d}-of-{count:05d}.safetensors"


def _shards(entries: dict[str, atomic_files.Entry], limit: int) -> list[dict[str, atomic_files.Entry]]:
    """The weights of each file, in the order in which it is written."""
    shards: list[dict[str, atomic_files.Entry]] = [{}]
    used = 0
    for name, entry in entries.items():
        if shards[-1] and used + entry.size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = entry
        used += entry.size
    return [{name: shard[name] for name in writing_order(shard)} for shard in shards]
