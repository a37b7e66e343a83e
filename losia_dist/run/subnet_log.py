"""`subnets.jsonl`: where every layer's subnet lies, from the beginning of a run on, a line for each time it is set."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from losia_dist.localization.moves import SubnetMove
from losia_dist.run.conductor import LoSiA
from losia_dist.run.log_files import SUBNETS, cut_records


class SubnetLog:
    """Listens to a conductor on the one rank that writes; the others have none. Nothing is communicated.

    The indices wait on their device until `write`, which the loop calls between steps. A file that cannot be written is
    warned of once, and the run goes on: only its report will lack the subnets.

    A line holds: step (optimizer steps done), reason ("random", "located", "relocalized"; "resumed" where the lines before
    are not there), layer, group, shape [m, n], rows and columns (sorted, or "all"; of experts a list each), captured (share of
    the layer's importance inside the subnet, or null), random_share (what a random subnet of that size holds on average).

    Args:
        losia: of the run; made before the first subnets are located, so that this is told of it.
    """

    def __init__(self, losia: LoSiA) -> None:
        self._losia = losia
        self._pending: list[SubnetMove] = []
        self._file: Any = None
        losia.on_move.append(self._pending.append)

    def begin(self, directory: Path, continues: bool) -> None:
        """Open the file, and write where the subnets lie now.

        Args:
            continues: the lines there, up to the conductor's step, are this run's and stay; else they are replaced.
        """
        path, step = directory / SUBNETS, self._losia.steps
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = cut_records(path, lambda record: record.get("step", step + 1) <= step) if continues else 0
            self._file = path.open("a" if continues else "w", encoding="utf-8")
        except OSError as error:
            self._give_up(error)
            return
        if not kept:
            self._write_first()
        self.write()

    def write(self) -> None:
        """Write what the conductor has told since the last call. Called between steps."""
        if self._file is None:
            self._pending.clear()
            return
        moves, self._pending[:] = list(self._pending), []
        for move in moves:
            self._line(vars(move))

    def close(self) -> None:
        """Write the rest and stop listening."""
        self.write()
        self._losia.on_move.remove(self._pending.append)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_first(self) -> None:
        losia = self._losia
        reason = "resumed" if losia.steps else "located" if losia.located and losia.config.needs_calibration else "random"
        moved = {move.layer for move in self._pending}  # what was there before is nobody's concern
        for site in losia.sites:
            if site.name not in moved:
                self._line(
                    {
                        "step": losia.steps,
                        "reason": reason,
                        "layer": site.name,
                        "group": site.group_name,
                        "shape": site.shape,
                        "rows": site.row_index,
                        "columns": site.col_index,
                        "captured": None,
                    }
                )

    def _line(self, move: dict[str, Any]) -> None:
        """move: what a SubnetMove holds; its random_share is written anew."""
        if self._file is None:
            return
        (m, n), rows, columns, captured = (move[name] for name in ("shape", "rows", "columns", "captured"))
        share = rows.shape[-1] * columns.shape[-1] / (m * n)
        written = {
            "rows": _indices(rows, m),
            "columns": _indices(columns, n),
            "captured": None if captured is None else round(captured, 6),
            "random_share": round(share, 9),
        }
        try:
            self._file.write(json.dumps({**move, **written}) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warnings.warn(f"{SUBNETS} cannot be written ({error}): the run's report will lack its subnets.", stacklevel=3)
        self._file = None


def _indices(chosen: Tensor, size: int) -> list[int] | str:
    return "all" if chosen.shape[-1] == size else chosen.tolist()
