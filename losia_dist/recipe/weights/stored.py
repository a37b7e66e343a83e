"""Tensors in safetensors files: where they lie, whether all of them is there, and reading any range of their elements.

Files are read, not mapped: what was read can be counted as the process's own memory, and what it did not ask for never is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losia_dist.checkpoint.safetensors_io import DTYPES, read_header
from losia_dist.errors import ConfigError, some

_PIECE = 16 << 20  # bytes read at a time
_SAMPLES, _SAMPLE = 32, 4096  # pieces and bytes of a file that tell it from another of the same shape
_AGAIN = "Download or copy it again."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: row-major, from byte `begin` of the file on. dtype: None where it is none that is read here."""

    file: StoredFile
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int

    def like(self) -> Tensor:
        """Its shape and dtype, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """All of it, on the CPU, in its own dtype."""
        values = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(values.view(-1), 0)
        return values

    def read_into(self, target: Tensor, start: int) -> None:
        """Elements [start, start + target.numel()) into a flat contiguous tensor, cast to its dtype, on its device.

        Raises:
            ConfigError: the file cannot be read.
        """
        assert self.dtype is not None
        size = self.dtype.itemsize
        for place in range(0, target.numel(), _PIECE // size):
            part = target[place : place + _PIECE // size]
            piece = self.file.read(self.begin + (start + place) * size, part.numel() * size)
            part.copy_(piece.view(self.dtype))


class StoredFile:
    """One safetensors file, whose header was read and agrees with its size.

    Raises:
        ConfigError: missing, unreadable, truncated, or not in this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.size, self._header_print, places = read_header(self.path)
        except OSError as error:
            raise self._unreadable(error) from error
        except ValueError as error:
            raise ConfigError(f"{self.path} {error}. {_AGAIN}") from error
        # Not 8-bit floats and packed numbers, which need a scale that is not in the tensor: none that is read here.
        dtypes = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")}
        self.tensors = {
            name: StoredTensor(self, dtypes.get(dtype), shape, begin) for name, (dtype, shape, begin) in places.items()
        }

    def read(self, begin: int, count: int) -> Tensor:
        """Bytes from `begin` on, uint8 [count]. Raises: ConfigError."""
        try:
            found = np.fromfile(self.path, np.uint8, count, offset=begin)
        except OSError as error:
            raise self._unreadable(error) from error
        if len(found) < count:
            raise ConfigError(f"{self.path} ended while it was read: it was changed or cut. {_AGAIN}")
        return torch.from_numpy(found)

    def fingerprint(self) -> list[int]:
        """Size, and checksums of the header and of a sample of the data: equal for equal files, on any machine."""
        found = 0
        for place in range(_SAMPLES if self.size > _SAMPLE else 0):
            sample = self.read((self.size - _SAMPLE) * place // (_SAMPLES - 1), _SAMPLE)
            found = zlib.crc32(sample.numpy().tobytes(), found)
        return [self.size, self._header_print, found]

    def _unreadable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.path} cannot be read: {error.strerror}. The model's files must be there on every machine that trains."
        )


def open_files(files: list[Path], index: Path | None, find: Callable[[str], Path]) -> dict[str, StoredTensor]:
    """Every tensor of a model by its name on disk.

    Args:
        files: those of the model, where there is no index.
        index: model.safetensors.index.json, which names a file for every tensor.
        find: the path of a file that the index names.

    Raises:
        ConfigError: an index that is damaged or does not fit its files; a file that is missing, truncated or damaged.
    """
    if index is None:
        return {name: tensor for path in files for name, tensor in StoredFile(path).tensors.items()}
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in where.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not an index of safetensors files ({error}). {_AGAIN}") from error
    opened = {name: StoredFile(find(name)) for name in names}
    lost = [name for name, file in where.items() if name not in opened[file].tensors]
    if lost:
        raise ConfigError(
            f"{index} places {some(map(repr, lost), 1)} in {where[lost[0]]}, which has no such tensor: the index and the files "
            f"are not of one model. {_AGAIN}"
        )
    return {name: opened[file].tensors[name] for name, file in where.items()}
