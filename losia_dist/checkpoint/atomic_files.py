"""Writing files so that a crash, a full disk or a cut wire leaves either the whole file or none: sync, then rename.

Tensors are written in the safetensors format, a tensor at a time (`safetensors_io`). torch.distributed.checkpoint is not used:
its default format is pickle; its safetensors writer takes tensors only (no plain values), whole ones or DTensors (ZeRO's flat
shards are neither), and one state dict that holds everything at once.
"""

from __future__ import annotations

import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist.checkpoint.safetensors_io import Entry, header_bytes, writing_order
from losia_dist.errors import CheckpointError

_CHUNK = 1 << 24


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of a file that was written: what a manifest keeps of it."""

    size: int
    crc32: int


class TensorWriter:
    """Writes one safetensors file, a tensor at a time, in the order of `order`; `close` syncs it to the disk.

    Args:
        path: must not exist.
        entries: what the file will hold, known before the first tensor is there.
        metadata: strings for the file's header.
    """

    def __init__(self, path: Path, entries: dict[str, Entry], metadata: dict[str, str] | None = None) -> None:
        self.order = writing_order(entries)
        self._entries, self._written, self.size, self._crc = entries, 0, 0, 0
        self._file = open(path, "xb")  # noqa: SIM115 (closed by close)
        try:
            self._append(header_bytes(entries, metadata))
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of `order` (any device)."""
        entry = self._entries[name]
        assert name == self.order[self._written] and tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, name
        self._written += 1
        if entry.size:
            data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._append(memoryview(data))

    def close(self) -> FileRecord:
        """Sync and close; all tensors must have been written."""
        assert self._written == len(self.order)
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return FileRecord(self.size, self._crc)

    def abandon(self) -> None:
        """Close without syncing, after an error."""
        self._file.close()

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.size += len(data)
        self._crc = zlib.crc32(data, self._crc)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> FileRecord:
    """Write tensors that are all at hand into one safetensors file."""
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = TensorWriter(path, entries, metadata)
    try:
        for name in writer.order:
            writer.write(name, tensors[name])
        return writer.close()
    finally:
        writer.abandon()


def write_text(path: Path, text: str) -> FileRecord:
    """Replace a small file as a whole: written beside, synced, renamed."""
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    data = text.encode()
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return FileRecord(len(data), zlib.crc32(data))


def rename_directory(source: Path, target: Path) -> None:
    """Give a finished directory its name; `target` does not exist. Durable when it returns."""
    sync_directory(source)
    os.replace(source, target)
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    """Make names that were added to a directory, or taken out of it, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def check_space(directory: Path, needed: int) -> None:
    """Refuse before anything is written what the disk cannot hold; `needed` bytes in all ranks' files together.

    Raises:
        CheckpointError: less than that is free, and how much is missing.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"not enough disk space in {directory}: {needed:,} bytes are needed and {free:,} are free. Free "
            f"{needed - free:,} bytes, save elsewhere, or keep fewer checkpoints (keep_last); earlier ones are untouched."
        )


def remove(path: Path) -> None:
    """Delete a file or a directory with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
