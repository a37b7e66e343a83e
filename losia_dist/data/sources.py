"""What --train_file names: files, directories, globs, data sets saved by `datasets` or on the hub; parts and mixes of them."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import random
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch.utils.data import ConcatDataset, Subset

from losia_dist.data.record_files import SUFFIXES, RawRecords, Table, digest_of, kind_of, read_file
from losia_dist.errors import ConfigError, DataError

DEFAULT_SPLIT = "train"
_SLICE = re.compile(r"^(?P<rest>.+)\[(?P<start>\d*):(?P<stop>\d*)\]$")
_WEIGHT = re.compile(r"^(?P<rest>.+):(?P<weight>\d+(\.\d+)?|\.\d+)$")
_GLOB = re.compile(r"[*?\[]")


def join(parts: Sequence[RawRecords], picks: Sequence[Sequence[int]], name: str) -> RawRecords:
    """Records of several sources as one: `picks[k]` of `parts[k]`, one part after the other."""
    rows: Any = ConcatDataset([Subset(cast(Any, part.rows), pick) for part, pick in zip(parts, picks, strict=True)])

    def locate(index: int) -> str:
        part = bisect_right(rows.cumulative_sizes, index)
        return parts[part].place(picks[part][index - rows.cumulative_sizes[part]])  # counted from the part's end

    def identity() -> str | None:
        of_parts = [part.identity() for part in parts]
        of_picks = [hashlib.blake2b(array("q", pick)).hexdigest() for pick in picks]
        return None if None in of_parts else json.dumps([of_parts, of_picks])

    return RawRecords(rows, name, locate, identity)


class Named(NamedTuple):
    """A source: what to read, the part of it, its share of the mix, and how it was written, without the share."""

    text: str
    part: slice
    weight: float | None
    written: str


def read_sources(sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> RawRecords:
    """Read one source or several. Every rank calls it and reads the same, so that every rank raises the same error.

    A source is a file (`record_files.SUFFIXES`, each also .gz or .zst), a directory or glob of such files, a directory of
    `datasets.save_to_disk`, or a hub name; the last two take a split, "name:split" (default "train"), or
    "name:configuration:split". `[start:stop]` behind it takes a part of its records.

    Several are read one after the other. With weights, "a.jsonl:0.7 b.jsonl:0.3", they are mixed in these shares: as many
    records as there can be without one that repeats, drawn from each, the same on every rank and at every start.

    Raises: DataError when a source is missing, malformed or empty; ConfigError for weights that cannot be.
    """
    several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    named = [parse_source(str(source)) for source in several]
    weights = [one.weight for one in named if one.weight is not None]
    if weights and (len(weights) != len(named) or not all(weights)):
        raise ConfigError(
            f"{' '.join(map(str, several))}: give every source a weight above 0, as in a.jsonl:0.7 b.jsonl:0.3, or none."
        )
    read = [_read(one) for one in named]
    if len(read) == 1:
        return read[0]
    picks: list[Sequence[int]] = [range(len(raw.rows)) for raw in read]
    if weights:
        whole = min(len(raw.rows) / weight for raw, weight in zip(read, weights, strict=True))
        counts = [max(1, math.floor(whole * weight + 1e-9)) for weight in weights]
        picks = [sorted(random.Random(0).sample(pick, count)) for pick, count in zip(picks, counts, strict=True)]
    return join(read, picks, " ".join(str(source) for source in several))


def places_of(source: str) -> list[Path]:
    """Files and directories on the disk that a source is read from, without its part and weight; none of a hub name."""
    text = parse_source(source).text
    return [Path(text)] if Path(text).exists() else [Path(name) for name in glob.glob(text, recursive=True)]


def parse_source(text: str) -> Named:
    weight, part, written = None, slice(None), text
    if not Path(text).exists():
        if found := _WEIGHT.match(text):
            text, weight = found["rest"], float(found["weight"])
            written = text
        if found := _SLICE.match(text):
            text = found["rest"]
            part = slice(*(int(found[key]) if found[key] else None for key in ("start", "stop")))
    return Named(text, part, weight, written)


def _read(named: Named) -> RawRecords:
    raw = _read_whole(named.text)
    if named.part != slice(None):
        raw = join([raw], [range(len(raw.rows))[named.part]], named.written)
    if len(raw.rows) == 0:
        raise DataError(f"{raw.name}: the data set is empty. Give a source with at least one record.")
    return raw


def _read_whole(source: str) -> RawRecords:
    files = files_of(source)
    if files is None:
        return _read_with_datasets(source)
    if files == [Path(source)]:
        return read_file(files[0])
    parts = [raw for raw in map(read_file, files) if len(raw.rows)]
    return join(parts, [range(len(part.rows)) for part in parts], source) if parts else RawRecords([], source)


def files_of(source: str) -> list[Path] | None:
    """The files that a source without part and weight names, in order; None of a saved data set or one on the hub.

    Raises: DataError when it names none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir() and not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file))
    elif not path.is_dir() and _GLOB.search(source):
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    elif kind_of(path) is not None:
        raise DataError(f"{path}: no such file. Give the path of an existing file.")
    else:
        return None
    if not files:
        raise DataError(f"{source}: no file of records there ({', '.join(SUFFIXES)}), and no data set that was saved.")
    return files


def _read_with_datasets(source: str) -> RawRecords:
    import datasets  # imported late: it takes a second, and files of text do not need it

    name, *rest = source.split(":") if not Path(source).exists() else [source]
    if Path(name).is_dir():
        try:
            loaded = datasets.load_from_disk(name)
        except Exception as error:  # the reader raises many types for a directory that it did not write
            raise DataError(
                f"{name}: not a directory written by datasets' save_to_disk, or without records ({error}). "
                "Give such a directory, or files of records."
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            loaded = _choose_split(loaded, name, rest)
        elif rest:
            raise DataError(f"{source}: {name} holds one data set without splits. Leave out ':{':'.join(rest)}'.")
        files = sorted(file for file in Path(name).rglob("*") if file.is_file())
        split = ":".join(rest)
        return RawRecords(Table(loaded), source, identity=lambda: split + "".join(map(digest_of, files)))

    name, configuration, split = parse_hub_name(source)
    with naming_hub(source, name, split):
        loaded = datasets.load_dataset(name, configuration, split=split)
    return RawRecords(Table(loaded), source, identity=lambda: loaded._fingerprint)


def parse_hub_name(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a data set on the hub. Raises: DataError."""
    name, *rest = source.split(":")
    if Path(name).is_absolute() or name.startswith((".", "~")) or not name:
        raise DataError(f"{source}: no such file or directory.")
    if len(rest) > 2:
        raise DataError(f"{source}: write a hub data set as 'name', 'name:split' or 'name:configuration:split'.")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else DEFAULT_SPLIT


@contextmanager
def naming_hub(source: str, name: str, split: str) -> Iterator[None]:
    """What reading from the hub raises (network, permission, missing name or split), as a DataError."""
    try:
        yield
    except Exception as error:  # each is a type of its own
        raise DataError(
            f"{source}: no such file or directory, and reading it as the data set '{name}' (split '{split}') from the "
            f"Hugging Face hub failed: {type(error).__name__}: {error}. Check the name, the split and the network."
        ) from error


def _choose_split(loaded: Any, name: str, rest: list[str]) -> Any:
    split = rest[-1] if rest else DEFAULT_SPLIT if DEFAULT_SPLIT in loaded or len(loaded) != 1 else next(iter(loaded))
    if split not in loaded:
        choices = ", ".join(f"'{name}:{choice}'" for choice in sorted(loaded))
        raise DataError(f"{name}: no split '{split}'. Give one of {choices}.")
    return loaded[split]
