"""Tokenized data on disk: made once by the processes of a machine together, mapped by each, found again at the next start.

A data set's directory is named by a hash of all that its tokens follow from: the records' files by content, the tokenizer, the
chat template and the settings, and this package's own code. So it never has to be thrown away for being out of date.

    ids.bin       int32, the tokens of all examples
    learned.bin   a byte per token: whether it carries loss
    ends.bin      int64, where each example ends, after a 0
    manifest.json sizes of these, and the report
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from losia_dist.data.dataset import Report, Settings, TokenizedDataset, tokenize
from losia_dist.data.records import Records
from losia_dist.data.streaming import Stream
from losia_dist.errors import DataError

VARIABLE = "LOSIA_DATA_CACHE"
_FILES = ("ids.bin", "learned.bin", "ends.bin")
_MANIFEST = "manifest.json"
_BLOCK = 2_000  # records held in memory before they are written
_ABANDONED = 24 * 3600  # seconds after which a half-made data set is no longer being made


class MappedDataset(TokenizedDataset):
    """A data set in a directory, mapped: processes of a machine share its memory, and it can be given back at any time."""

    def __init__(self, directory: Path, max_length: int) -> None:
        manifest = _read_manifest(directory)
        super().__init__(max_length)
        self._report = Report(**manifest["report"])
        self._print = manifest["fingerprint"]
        self.unused: list[str] = manifest["unused"]
        self._ids: Any = _mapped(directory / "ids.bin")
        self._learned: Any = _mapped(directory / "learned.bin")
        self._ends: Any = memoryview(_mapped(directory / "ends.bin")).cast("q")

    def fingerprint(self) -> str:
        return self._print

    def report(self) -> Report:
        return self._report


def default_directory() -> Path:
    """Where tokenized data is kept if nothing else is said: $LOSIA_DATA_CACHE, or losia_dist/data in the user's cache."""
    given = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given if given else Path(base) / "losia_dist" / "data").expanduser()


def key_of(records: Records | Stream, tokenizer: Any, settings: Settings) -> str | None:
    """The name of the data set that these give; None where they cannot be told by their content."""
    identity = records.identity()
    if identity is None or not getattr(tokenizer, "is_fast", False):
        return None
    digest = hashlib.blake2b(digest_size=16)
    parts = [
        *(file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))),
        identity,
        tokenizer.backend_tokenizer.to_str(),
        json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str),
        json.dumps(asdict(settings), sort_keys=True, default=str),
    ]
    for text in parts:
        digest.update(hashlib.blake2b(text.encode(errors="surrogatepass")).digest())
    return digest.hexdigest()


def find(directory: Path, key: str, max_length: int) -> MappedDataset | None:
    """The data set of this key, if it is there and whole; it has then been used today."""
    try:
        found = MappedDataset(directory / key, max_length)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):  # another user's
        os.utime(directory / key / _MANIFEST)
    return found


def begin(directory: Path, key: str) -> Path:
    """An empty directory in which a data set is made. Raises: OSError when there can be none."""
    directory.mkdir(parents=True, exist_ok=True)
    for other in directory.glob("making-*"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > _ABANDONED:
                shutil.rmtree(other, ignore_errors=True)
    making = directory / f"making-{key}-{os.uname().nodename}-{os.getpid()}-{time.time_ns()}"
    making.mkdir()
    return making


def write_part(
    making: Path,
    part: int,
    parts: int,
    records: Records | Stream,
    tokenizer: Any,
    settings: Settings,
    done: Callable[[int], Any],
) -> None:
    """Tokenize a part of `records` into the directory. Raises: DataError, for a full disk too.

    done: told how many records have just been written.
    """
    report = Report(0, 0, 0)
    unused: set[str] = set()
    with _naming(making):
        files = {name: (making / f"{part}-{name}").open("wb") for name in _FILES}
        try:
            for block in records.blocks(part, parts, _BLOCK):
                found = tokenize(block, tokenizer, settings)
                found.write(*files.values())
                report, unused = report + found.report(), unused | block.unused
                done(len(block))
        finally:
            for file in files.values():
                file.close()
        (making / f"{part}.json").write_text(json.dumps({"report": asdict(report), "unused": sorted(unused)}))


def join(making: Path, parts: int, key: str) -> None:
    """Put the parts together under the data set's key, beside `making`. Raises: DataError, for a full disk too."""
    directory = making.parent
    digest = hashlib.blake2b(digest_size=8)
    report = Report(0, 0, 0)
    unused: set[str] = set()
    with _naming(making):
        for part in range(parts):
            saved = json.loads((making / f"{part}.json").read_text())
            report, unused = report + Report(**saved["report"]), unused | set(saved["unused"])
        for file_name in _FILES:
            with (making / file_name).open("wb") as whole:
                pieces = _ends(making, parts) if file_name == "ends.bin" else _bytes(making, parts, file_name)
                for piece in pieces:
                    digest.update(piece)
                    whole.write(piece)
                whole.flush()
                os.fsync(whole.fileno())
        for file in making.glob("[0-9]*"):
            file.unlink()
        manifest = {
            "report": asdict(report),
            "fingerprint": digest.hexdigest(),
            "unused": sorted(unused),
            "sizes": {file_name: (making / file_name).stat().st_size for file_name in _FILES},
        }
        (making / _MANIFEST).write_text(json.dumps(manifest))
        if find(directory, key, 2) is None:
            shutil.rmtree(directory / key, ignore_errors=True)  # cut short or damaged
            with contextlib.suppress(OSError):  # another run was faster
                making.rename(directory / key)


def _bytes(making: Path, parts: int, name: str) -> Iterator[bytes]:
    for part in range(parts):
        with (making / f"{part}-{name}").open("rb") as file:
            while piece := file.read(1 << 24):
                yield piece


def _ends(making: Path, parts: int) -> Iterator[bytes]:
    """Parts hold lengths; the whole holds where each example ends."""
    end = 0
    yield np.zeros(1, np.int64).tobytes()
    for piece in _bytes(making, parts, "ends.bin"):
        ends = end + np.cumsum(np.frombuffer(piece, np.int64))
        end = int(ends[-1])
        yield ends.tobytes()


def _read_manifest(directory: Path) -> dict[str, Any]:
    manifest = json.loads((directory / _MANIFEST).read_text())
    for name, size in manifest["sizes"].items():
        if (directory / name).stat().st_size != size:
            raise ValueError(f"{directory / name} is cut short")
    return manifest  # type: ignore[no-any-return]


def _mapped(path: Path) -> Any:
    if path.stat().st_size == 0:
        return bytearray()
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # never written; torch warns of what cannot be


@contextmanager
def _naming(making: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise DataError(
            f"{making.parent}: tokenized data cannot be written there: {reason}. Make room, name another directory with "
            "--data_cache, or keep the data in each rank's memory with --data_cache off."
        ) from error
