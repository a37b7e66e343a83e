"""Finished runs, one JSON object a line, appended the moment a run ends: an interrupted night goes on where it stopped."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.one_level import flat
from benchmarks.quality.setting import Setting
from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.config.removed import without_kept


def _setting(record: dict[str, Any]) -> Setting:
    """Of a stored run. An option of LoSiA that came later, or went since, had its default then, which changes nothing."""
    setting = Setting(**record["setting"])
    if "rank_factor" not in setting.resolved:
        return setting  # another method's
    return replace(setting, resolved={**flat(LoSiAConfig()), **without_kept(setting.resolved)})


class Store:
    """Runs in a file of JSON lines. Several processes may append to one file; each line is written at once.

    Args:
        path: the file; made with the first run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def records(self) -> list[dict[str, Any]]:
        """All finished runs, oldest first: {"setting": ..., "result": ..., "header": ...}; a line cut off is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the process was ended while it wrote; that run is done again
        return found

    def find(self, setting: Setting) -> dict[str, Any] | None:
        """The latest record of a run with these settings, or None."""
        for record in reversed(self.records()):
            if _setting(record).key == setting.key:
                return record
        return None

    def family(self, setting: Setting) -> list[dict[str, Any]]:
        """The latest record of every learning rate and seed that was run with these settings, by seed and rate."""
        found = {}
        for record in self.records():
            stored = _setting(record)
            if stored.at(rate=setting.rate, seed=setting.seed).key == setting.key:
                found[stored.seed, stored.rate] = record
        return [found[place] for place in sorted(found)]

    def append(self, setting: Setting, result: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
        """Add a finished run and return its record."""
        record = {"setting": setting.to_dict(), "result": result, "header": header}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record) + "\n"
        with self.path.open("ab+") as file:
            if file.tell() and self._cut_off():
                line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return record

    def _cut_off(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
