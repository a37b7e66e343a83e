"""`Records`: a data set's records in one form, each knowing where it came from; and the split for validation."""

from __future__ import annotations

import hashlib
import json
import os
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from losia_dist.data.forms import canonical, check_form, detect_form
from losia_dist.data.record_files import RawRecords
from losia_dist.data.sources import read_sources
from losia_dist.errors import ConfigError, DataError


class Records(Sequence[dict[str, Any]]):
    """A read-only sequence of canonical records (see `forms`), all of the form `self.form`.

    Records are brought into shape when they are read, so that an Arrow data set stays on disk.
    """

    def __init__(
        self,
        raw: RawRecords,
        form: str,
        indices: Sequence[int] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.raw = raw
        self.columns = columns or {}
        self.form = form
        self.unused: set[str] = set()  # keys that are there and are not read, as far as records were read
        self._indices: Sequence[int] = range(len(raw.rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        source_index = self._indices[index]
        where = self.raw.place(source_index)
        return canonical(rename(self.raw.rows[source_index], self.columns, where), self.form, where, self.unused)

    @property
    def name(self) -> str:
        return self.raw.name

    def blocks(self, part: int, parts: int, size: int) -> Iterator[Records]:
        """The records that are this part's of the whole, in their order, at most `size` at a time."""
        begin, end = (len(self) * at // parts for at in (part, part + 1))
        for start in range(begin, end, size):
            yield self[start : min(start + size, end)]

    def place(self, index: int) -> str:
        """Where record `index` came from, for messages: "train.jsonl, line 7" or "name:split, record 6"."""
        return self.raw.place(self._indices[index])

    def identity(self) -> str | None:
        """What the records follow from, as text: their source by its content, and which of it in what form; or None."""
        source = self.raw.identity()
        if source is None:
            return None
        indices = hashlib.blake2b(array("q", self._indices)).hexdigest()
        return json.dumps([source, self.form, dict(self.columns), indices])

    def select(self, indices: Sequence[int]) -> Records:
        """The records at `indices`, in that order; nothing is copied."""
        return Records(self.raw, self.form, [self._indices[index] for index in indices], self.columns)


def load_records(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    check: bool = True,
) -> Records:
    """Read a data set and check every record. Every rank calls it; all read the same and raise the same.

    source: a file, directory, glob, saved data set or hub name, or several, with weights or without; see `sources`.
    form: "instruction", "chat", "continuation" or "text"; None takes the form of the first record. All records must have it.
    columns: {name in the source: key of the form}, for sources that use other names.
    check: read every record now; else a bad one is an error when it is read.

    Raises: DataError, naming the file and the line (or the record), for anything that cannot be used;
    ConfigError for an unknown form.
    """
    if form is not None:
        check_form(form)
    raw = read_sources(source)
    if form is None:
        form = detect_form(rename(raw.rows[0], columns or {}, raw.place(0)), raw.place(0))
    records = Records(raw, form, columns=columns)
    if check:
        for _ in records:  # reading a record checks it; a bad one should fail now, not an hour into training
            pass
    return records


def train_validation_split(records: Records, validation_size: int | float, seed: int = 0) -> tuple[Records, Records]:
    """Divide `records` at random into (training, validation). It depends on the number of records and `seed` only.

    validation_size: a number of records (int), or a share of them between 0 and 1 (float). Both parts keep the
    order of the source.

    Raises: ConfigError for a size that is neither; DataError when a part would be empty.
    """
    share = isinstance(validation_size, float) and 0 < validation_size < 1
    if not share and (type(validation_size) is not int or validation_size < 1):
        raise ConfigError(
            f"validation_size={validation_size!r}: give a number of records (int, at least 1) or a share "
            "(float between 0 and 1)."
        )
    size = max(1, round(len(records) * validation_size)) if share else int(validation_size)
    if size >= len(records):
        raise DataError(
            f"{records.raw.name}: {size} of {len(records)} records for validation leave none for training. "
            "Lower validation_size or give more records."
        )
    chosen = set(random.Random(seed).sample(range(len(records)), size))
    return (
        records.select([index for index in range(len(records)) if index not in chosen]),
        records.select(sorted(chosen)),
    )


def rename(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The row with the names that --columns gives its keys. Raises: DataError."""
    if not columns:
        return row
    for name, key in columns.items():
        if name not in row:
            raise DataError(f"{where}: no '{name}', which is to be read as '{key}'. It has {', '.join(map(repr, row))}.")
        if key in row and key not in columns and row[key] is not None:
            raise DataError(f"{where}: '{name}' is to be read as '{key}', which the record has too. Choose one of them.")
    rest = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return rest | {key: row[name] for name, key in columns.items()}
