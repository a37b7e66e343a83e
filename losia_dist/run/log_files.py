"""Files of a run's directory that grow by a line: whole JSON objects, of which a killed process may leave the last one half."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Names in a run's directory. losia_config.json lies beside them.
METRICS, SUBNETS, FACTS, SUMMARY = "metrics.jsonl", "subnets.jsonl", "losia_run.json", "summary.json"
MEMORY = "losia_memory.json"


def read_records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line's object, one at a time; None for a line that holds none. A file that is not there has no lines.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                yield _object(line)


def cut_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Leave the lines that `keep` wants, up to the first that is not whole; returns how many. At no moment is the file half
    rewritten.

    Raises:
        OSError: it cannot be rewritten.
    """
    beside, kept = path.with_name(f"{path.name}.incomplete"), 0
    with beside.open("w", encoding="utf-8") as target:
        for record in read_records(path):
            if record is None:
                break  # the process was killed while it wrote the last one
            if keep(record):
                target.write(json.dumps(record) + "\n")
                kept += 1
    os.replace(beside, path)
    return kept


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
