"""Reading raw records: a JSON Lines file, a JSON file, a saved `datasets` directory, or a name on the Hugging Face hub.

JSON is parsed here, not by `datasets`, so that an error can name the file and the line a person has to open.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from losia_dist.errors import DataError

DEFAULT_SPLIT = "train"


class RawRecords(NamedTuple):
    """Raw records, not yet checked. `rows[i]` is what the source holds; `lines[i]` its 1-based line, if it has one."""

    rows: Sequence[Any]
    name: str
    lines: array[int] | None = None


def read_source(source: str | os.PathLike[str]) -> RawRecords:
    """Read `source`: a `.jsonl` or `.json` file, a directory of `datasets.save_to_disk`, or a hub name.

    A directory and a hub name take an optional split, "name:split" (default "train"); a hub name that has several
    configurations is "name:configuration:split". Every rank calls this and reads the same, so that every rank
    raises the same error.

    Raises: DataError when the source is missing, malformed or empty.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise DataError(f"{path}: no such file. Give the path of an existing .jsonl or .json file.")
        raw = _read_json_lines(path) if path.suffix == ".jsonl" else _read_json(path)
    elif path.is_file():
        raise DataError(f"{path}: cannot read a '{path.suffix}' file. Convert it to .jsonl: one JSON object on each line.")
    else:
        raw = _read_with_datasets(str(source))
    if len(raw.rows) == 0:
        raise DataError(f"{raw.name}: the data set is empty. Give a source with at least one record.")
    return raw


def _read_json_lines(path: Path) -> RawRecords:
    rows: list[dict[str, Any]] = []
    lines = array("q")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue  # blank lines are common at the end of hand-edited files and carry no record
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: malformed JSON: {error.msg} (column {error.colno}). Each line must be one JSON object."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, got {_kind(row)}. Each line must be one JSON object.")
            rows.append(row)
            lines.append(number)
    return RawRecords(rows, str(path), lines)


def _read_json(path: Path) -> RawRecords:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        hint = " If it has one object on each line, name it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: malformed JSON: {error.msg} (column {error.colno}).{hint}") from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: a .json file must hold a list of objects, got {_kind(rows)}. "
            "If it has one object on each line, name it .jsonl."
        )
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, record {index}: expected a JSON object, got {_kind(row)}.")
    return RawRecords(rows, str(path))


def _read_with_datasets(source: str) -> RawRecords:
    import datasets  # imported late: it takes a second, and JSON files do not need it

    name, *rest = source.split(":") if not Path(source).exists() else [source]
    if Path(name).is_dir():
        try:
            loaded = datasets.load_from_disk(name)
        except Exception as error:  # the reader raises many types for a directory that it did not write
            raise DataError(
                f"{name}: not a directory written by datasets' save_to_disk, or without records ({error}). "
                "Give such a directory, or a .jsonl file."
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            loaded = _choose_split(loaded, name, rest)
        elif rest:
            raise DataError(f"{source}: {name} holds one data set without splits. Leave out ':{':'.join(rest)}'.")
        return RawRecords(loaded, source)

    if Path(name).is_absolute() or name.startswith((".", "~")) or not name:
        raise DataError(f"{source}: no such file or directory.")
    if len(rest) > 2:
        raise DataError(f"{source}: write a hub data set as 'name', 'name:split' or 'name:configuration:split'.")
    configuration = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else DEFAULT_SPLIT
    try:
        loaded = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # network, permission, missing name or split: each is a type of its own
        raise DataError(
            f"{source}: no such file or directory, and reading it as the data set '{name}' (split '{split}') from the "
            f"Hugging Face hub failed: {type(error).__name__}: {error}. Check the name, the split and the network."
        ) from error
    return RawRecords(loaded, source)


def _choose_split(loaded: Any, name: str, rest: list[str]) -> Any:
    split = rest[-1] if rest else DEFAULT_SPLIT if DEFAULT_SPLIT in loaded or len(loaded) != 1 else next(iter(loaded))
    if split not in loaded:
        choices = ", ".join(f"'{name}:{choice}'" for choice in sorted(loaded))
        raise DataError(f"{name}: no split '{split}'. Give one of {choices}.")
    return loaded[split]


def _kind(value: Any) -> str:
    names = {
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
