"""The header of a safetensors file (8 bytes of length, then JSON), for what the format's own library does not do: it writes
tensors that are all in memory at once, and reads no range of a tensor's elements. All else asks the library."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as DTYPES  # the format's name of a dtype -> the dtype

_LARGEST = 100_000_000  # bytes of a header; the format's own limit
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Dtype and shape of a tensor that a file is to hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """As manifests and configurations have it."""
    return str(dtype).removeprefix("torch.")


def writing_order(entries: dict[str, Entry]) -> list[str]:
    """The order of tensors in a file: readers view the data in place, so wider types come first and every one is aligned."""
    return sorted(entries, key=lambda name: -entries[name].dtype.itemsize)


def header_bytes(entries: dict[str, Entry], metadata: dict[str, str] | None) -> bytes:
    """What a file begins with whose tensors follow in `writing_order`."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in writing_order(entries):
        entry, begin = entries[name], end
        end = begin + entry.size
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[int, int, dict[str, tuple[str, tuple[int, ...], int]]]:
    """A file's size, the CRC-32 of its header's text, and each tensor's dtype by the format's name, shape, and first byte.

    Raises:
        OSError: it cannot be read.
        ValueError: it is truncated, or not in this format; the message goes on after the file's name.
    """
    with open(path, "rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        data = needed = 8 + int.from_bytes(opened.read(8), "little")
        text = opened.read(data - 8) if data <= min(size, _LARGEST + 8) else b"{}"
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        needed = max((data + entry["data_offsets"][1] for entry in header.values()), default=data)
        if needed <= size:
            with safe_open(str(path), framework="np"):
                pass  # it refuses places that do not fit
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"is not a safetensors file, or is damaged ({error})") from error
    if needed > size:
        raise ValueError(f"has {size} bytes of at least {needed}: it is truncated or damaged")
    places = {name: (entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0]) for name, entry in header.items()}
    return size, zlib.crc32(text), places
