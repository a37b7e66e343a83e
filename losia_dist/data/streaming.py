"""`Stream`: sources that are read from front to back and never kept, for data sets that are larger than the disk.

Tables and data sets on the hub are read as their bytes come in. What is kept is their tokens, in the cache, so that order,
packing and the resume are those of any data set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from losia_dist.data.forms import check_form, detect_form
from losia_dist.data.record_files import RawRecords, digest_of, naming_damage, read_file, stream_table, without_nulls
from losia_dist.data.records import Records, rename
from losia_dist.data.sources import Named, files_of, naming_hub, parse_hub_name, parse_source, read_sources
from losia_dist.errors import ConfigError, DataError


class _Part(NamedTuple):
    """A file, or a shard of a data set on the hub. rows: reads it anew. place: where its record of an index came from."""

    rows: Callable[[], Iterator[Any]]
    place: Callable[[int], str]


class Stream:
    """Records of one form, in order, each read when it is needed. For the arguments see `load_records`.

    Raises: DataError when a source is missing or empty; ConfigError for shares of a mix, which need the number of records.
    """

    def __init__(
        self,
        sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        form: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        named = [parse_source(str(source)) for source in several]
        self.name = " ".join(map(str, several))
        if any(one.weight is not None for one in named):
            raise ConfigError(
                f"{self.name}: shares of a mix need the number of records, which a stream does not know. "
                "Leave out --streaming, or the weights."
            )
        self.columns = columns or {}
        self.unused: set[str] = set()
        opened = [_open(one) for one in named]
        self._parts = [part for parts, _ in opened for part in parts]
        self._identities = [identify for _, identify in opened]
        first = next(((row, part.place(0)) for part in self._parts for row in part.rows()), None)
        if first is None:
            raise DataError(f"{self.name}: the data set is empty. Give a source with at least one record.")
        self.form = check_form(form) if form is not None else detect_form(rename(first[0], self.columns, first[1]), first[1])

    def identity(self) -> str:
        """A text that is another one when the records are others."""
        return json.dumps([[identify() for identify in self._identities], self.form, dict(self.columns)])

    def blocks(self, part: int, parts: int, size: int) -> Iterator[Records]:
        """The records that are this part's of the whole, in their order, at most `size` at a time."""
        count = len(self._parts)
        for one in self._parts[count * part // parts : count * (part + 1) // parts]:
            rows, first = one.rows(), 0
            while block := list(islice(rows, size)):
                raw = RawRecords(block, self.name, _from(one.place, first))
                yield Records(raw, self.form, columns=self.columns)
                first += len(block)


def _from(place: Callable[[int], str], first: int) -> Callable[[int], str]:
    return lambda index: place(first + index)


def _open(named: Named) -> tuple[list[_Part], Callable[[], Any]]:
    """The parts of a source, and what tells its content from another, which reads all of it: one rank of a machine asks."""
    files = files_of(named.text)
    if files is not None:
        parts = [_of_table(file) or _of_records(cache(partial(read_file, file))) for file in files]
        identify: Callable[[], Any] = lambda: [digest_of(file) for file in files]  # noqa: E731
    elif Path(named.text.partition(":")[0]).is_dir():
        raw = read_sources(named.text)
        parts, identify = [_of_records(lambda: raw)], raw.identity
    else:
        parts, version = of_hub(named.text, *parse_hub_name(named.text))
        identify = lambda: version  # noqa: E731
    if named.part == slice(None):
        return parts, identify
    start, stop = named.part.start or 0, named.part.stop
    whole = _Part(
        lambda: islice(chain.from_iterable(part.rows() for part in parts), start, stop),
        lambda index: f"{named.text}, record {start + index}",
    )
    return [whole], lambda: [identify(), start, stop]


def _of_table(file: Path) -> _Part | None:
    table = stream_table(file)

    def rows() -> Iterator[Any]:
        with naming_damage(file, "a table"):
            yield from map(without_nulls, table)

    return None if table is None else _Part(rows, lambda index: f"{file}, record {index}")


def _of_records(read: Callable[[], RawRecords]) -> _Part:
    return _Part(lambda: iter(read().rows), lambda index: read().place(index))


def of_hub(source: str, name: str, configuration: str | None, split: str) -> tuple[list[_Part], Any]:
    """The shards of a data set on the hub. What tells its content are its files and their versions there."""
    import datasets

    with naming_hub(source, name, split):
        builder = datasets.load_dataset_builder(name, configuration)
        shards = [builder.as_streaming_dataset(split=split)]
        if shards[0].num_shards > 1:
            shards = [shards[0].shard(shards[0].num_shards, index) for index in range(shards[0].num_shards)]

    def part(number: int, shard: Any) -> _Part:
        def rows() -> Iterator[Any]:
            with naming_hub(source, name, split):
                yield from map(without_nulls, shard)

        return _Part(rows, lambda index: f"{source}, shard {number}, record {index}")

    return [part(number, shard) for number, shard in enumerate(shards)], [source, builder.hash]
