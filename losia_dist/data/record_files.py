"""Reading one file of records. `datasets` reads tables; JSON and text are read here, so that an error can name the line.

A `.jsonl` or `.txt` file stays on disk: kept is where its lines begin, and a record is parsed when it is asked for.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from losia_dist.data.messages import show
from losia_dist.errors import DataError

# suffix -> the reader of `datasets`, and its options. Texts stay texts: an answer "007" is no number, and "NA" is not missing.
_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {"keep_default_na": False, "sep": ","}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
}
_LINES = (".jsonl", ".ndjson", ".txt")
SUFFIXES = (*_LINES, ".json", *_TABLES)
COMPRESSED = (".gz", ".zst")


@dataclass
class RawRecords:
    """Raw records, not yet checked: `rows[i]` is what the source holds.

    locate: where record i came from, for messages; None: its number. identity: a text that is another one when the records
    are others, or None if there is no such text.
    """

    rows: Sequence[Any]
    name: str
    locate: Callable[[int], str] | None = None
    identity: Callable[[], str | None] = lambda: None

    def place(self, index: int) -> str:
        """Where record `index` came from, for messages."""
        return f"{self.name}, record {index}" if self.locate is None else self.locate(index)


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read `path`, that of a compression left out; None when it cannot be read."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED] if path.suffix in COMPRESSED else path.suffixes
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def read_file(path: Path) -> RawRecords:
    """The records of one file. Raises: DataError naming the file, and the line where there is one."""
    return replace(_read_file(path), identity=lambda: f"{kind_of(path)} {digest_of(path)}")


def digest_of(path: Path) -> str:
    """A hash of a file's content."""
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read_file(path: Path) -> RawRecords:
    kind = kind_of(path)
    if kind is None:
        known = ", ".join(SUFFIXES)
        raise DataError(
            f"{path}: cannot read a '{path.suffix}' file. Convert it to one of {known} (each also {', '.join(COMPRESSED)})."
        )
    try:
        if kind in _TABLES:
            return _read_table(path, *_TABLES[kind])
        with _opened(path) as file:
            start = file.read(1 << 16)
            file.seek(0)
            if kind == ".json" and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return _read_json(path, file)
            lines = _Lines(file, (lambda text: {"text": text}) if kind == ".txt" else json.loads, str(path))
            return RawRecords(lines, str(path), lambda index: f"{path}, line {lines.numbers[index]}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. Give a file that this user can read.") from error


def without_nulls(value: Any) -> Any:
    """`value` without keys that are null. Columnar storage gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


class Table(Sequence[dict[str, Any]]):
    """Rows of a data set of `datasets`, without nulls."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        return without_nulls(self._table[index])


class _Lines(Sequence[Any]):
    """Lines of a file that stays on disk, parsed when they are read. Nothing of it is mapped: memory does not grow with it."""

    def __init__(self, file: IO[bytes], parse: Callable[[str], Any], name: str) -> None:
        self._file, self._parse, self._name = os.fdopen(os.dup(file.fileno()), "rb"), parse, name  # outlives the caller's
        self._starts, self.numbers = array("q"), array("q")
        at = self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if line.strip(b" \t\r\n\xef\xbb\xbf"):  # blank lines are common at the end of hand-edited files
                self._starts.append(at)
                self.numbers.append(number)
            at += len(line)
        self._starts.append(at)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        start, end = self._starts[index : index + 2]
        line = os.pread(self._file.fileno(), end - start, start)
        if len(line) != end - start:
            raise DataError(f"{self._name}: became shorter while it was read. Leave it as it is during a run.")
        where = f"{self._name}, line {self.numbers[index]}"
        with _naming_line(where):
            row = self._parse(line.partition(b"\n")[0].rstrip(b"\r").decode("utf-8" if start else "utf-8-sig"))
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {show(row)}. Give one on each line, or a list of them.")
        return row


@contextmanager
def _naming_line(where: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(
            f"{where}{line}: malformed JSON: {error.msg} (column {error.colno}). Give one JSON object on each line, or a list."
        ) from error


def _read_json(path: Path, file: IO[bytes]) -> RawRecords:
    """A list of objects."""
    with _naming_line(str(path)):
        rows = json.loads(file.read().decode("utf-8-sig"))
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, record {index}: expected a JSON object, got {show(row)}.")
    return RawRecords(rows, str(path))


def _read_table(path: Path, reader: str, options: dict[str, Any]) -> RawRecords:
    if path.suffix not in COMPRESSED:
        return RawRecords(Table(_load(path, path, reader, options)), str(path))
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / f"whole.{reader}"
        with _opened(path) as packed, whole.open("wb") as file:
            shutil.copyfileobj(packed, file)
        table = _load(path, whole, reader, {**options, "cache_dir": directory, "keep_in_memory": True})
    return RawRecords(Table(table), str(path))


def stream_table(path: Path) -> Any:
    """The rows of a table, read as they are asked for; None of a file that is no table, or a compressed one."""
    kind = kind_of(path)
    return None if kind not in _TABLES or path.suffix in COMPRESSED else _load(path, path, *_TABLES[kind], streaming=True)


def _load(path: Path, whole: Path, reader: str, options: dict[str, Any], streaming: bool = False) -> Any:
    """`whole`, which is `path` decompressed, as a data set of `datasets`."""
    import datasets  # imported late: it takes a second, and JSON files do not need it

    bar = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        with naming_damage(path, reader):
            if reader == "csv":
                with whole.open(encoding="utf-8-sig", newline="") as file:
                    names = next(csv.reader(file, delimiter=options["sep"]), [])
                options = {**options, "features": datasets.Features({name: datasets.Value("string") for name in names})}
            return datasets.load_dataset(reader, data_files=str(whole), split="train", streaming=streaming, **options)
    finally:
        if bar:
            datasets.utils.logging.enable_progress_bar()


@contextmanager
def naming_damage(path: Any, reader: str) -> Iterator[None]:
    """What reading `path` raises, as a DataError that names it."""
    try:
        yield
    except (DataError, PermissionError):
        raise
    except Exception as error:  # each reader has errors of its own
        reasons = {str(reason).strip().splitlines()[0] for reason in (error, error.__cause__) if str(reason or "").strip()}
        raise DataError(
            f"{path}: cannot be read as {reader}: {'; '.join(sorted(reasons))}. Write the file anew: it is damaged, "
            "cut short, or something else than its name says."
        ) from error


@contextmanager
def _opened(path: Path) -> Any:
    """The file's bytes, decompressed into a file without a name where it is compressed."""
    if path.suffix not in COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow

    with tempfile.TemporaryFile() as whole:
        try:
            with pyarrow.input_stream(str(path), compression="detect") as packed:
                shutil.copyfileobj(packed, whole)
        except OSError as error:
            if error.errno is not None:
                raise
            raise DataError(
                f"{path}: cannot be unpacked: {error}. It is damaged or cut short: copy or write it anew."
            ) from error
        whole.flush()
        whole.seek(0)
        yield whole
