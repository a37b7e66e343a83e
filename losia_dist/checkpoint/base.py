"""The weights that a run's checkpoints share: a base that is written once, and a journal of what changed in it since.

Frozen weights change only where a subnet was: once it has moved on, the values it left behind go to the journal, and no other
element ever changes. So a checkpoint costs its subnets, not the model.
"""

from __future__ import annotations

import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losia_dist.checkpoint import atomic_files, layout
from losia_dist.checkpoint.journal import Moved
from losia_dist.checkpoint.safetensors_io import dtype_name, writing_order
from losia_dist.checkpoint.tensor_names import Contents
from losia_dist.errors import CheckpointError
from losia_dist.ranks.agreement import Agreement
from losia_dist.sharding.interface import ParameterAccess


@dataclass
class Chain:
    """Base and journal of one directory, as the run in this process continues them; the same on every rank.

    Attributes:
        run: identity of the run, written into the base.
        base_crc32: checksum of the base's manifest.
        journal: journal files on the disk that lead from the base to the last save, in order, with size and CRC-32.
        pending: the places whose values are to be added to them at the next save.
        unsaved: those that a save failed to write.
    """

    directory: Path
    run: str
    base_crc32: int
    journal: dict[str, list[int]] = field(default_factory=dict)
    pending: Moved = field(default_factory=Moved)
    unsaved: Moved = field(default_factory=Moved)

    def check_still_there(self) -> None:
        """Refuse to go on in a directory that another run has taken over.

        Raises:
            CheckpointError: its base is missing or another run's.
        """
        base = self.directory / layout.BASE
        if layout.read_manifest(base, self.base_crc32)["run"] != self.run:
            raise CheckpointError(f"{base} belongs to another run: save into another directory.")


def write_base(
    directory: Path, contents: Contents, access: ParameterAccess, agreement: Agreement, description: dict[str, Any]
) -> Chain:
    """Write every weight that does not train, one at a time: gathered on all ranks, written by one of them.

    Called by all ranks, after `LoSiA.consolidate`. Needs memory for one weight beside the model, on each rank.

    Raises:
        CheckpointError: not enough space, or a write failed on any rank; nothing is left behind.
    """
    unsorted = {name: atomic_files.Entry(p.dtype, tuple(access.shape(p))) for name, p in contents.weights.items()}
    entries = {name: unsorted[name] for name in writing_order(unsorted)}  # the order in which they are gathered
    total = sum(entry.size for entry in entries.values())
    beside, run = agreement.gather((directory / f"{layout.BASE}.tmp-{uuid.uuid4().hex}", uuid.uuid4().hex))[0]
    try:
        agreement.attempt(f"saving to {directory}", lambda: atomic_files.check_space(directory, total))
        agreement.on_first(f"saving to {directory}", lambda: beside.mkdir())
        owner = _deal(entries, agreement.world_size)
        mine = {name: entry for name, entry in entries.items() if owner[name] == agreement.rank}
        record = _stream(beside, mine, entries, contents, access, agreement)
        records = {name: r for part in agreement.gather(record) for name, r in part.items()}

        def publish() -> int:
            written = {
                name: {"file": _file_name(owner[name]), "dtype": dtype_name(e.dtype), "shape": list(e.shape)}
                for name, e in entries.items()
            }
            content = {"run": run, "files": records, "weights": written, "aliases": contents.aliases, **description}
            manifest = layout.write_manifest(beside, content)
            atomic_files.remove(directory / layout.BASE)  # of a run that never completed a checkpoint here
            atomic_files.remove(directory / layout.JOURNAL)
            atomic_files.rename_directory(beside, directory / layout.BASE)
            return manifest.crc32

        return Chain(directory, run, agreement.on_first(f"saving to {directory}", publish))
    finally:
        if agreement.rank == 0:
            atomic_files.remove(beside)


def _stream(
    beside: Path,
    mine: dict[str, atomic_files.Entry],
    entries: dict[str, atomic_files.Entry],
    contents: Contents,
    access: ParameterAccess,
    agreement: Agreement,
) -> dict[str, list[int]]:
    """Gather weight after weight and write this rank's; after a failed write go on gathering, as the others wait for it.

    A thread writes one weight while the next ones are gathered, so that all ranks write at the same time.
    """
    path = beside / _file_name(agreement.rank)
    failure: BaseException | None = None
    writer: atomic_files.TensorWriter | None = None
    try:
        writer = atomic_files.TensorWriter(path, mine) if mine else None
    except OSError as error:
        failure = error
    writing: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as thread:
        for name in entries:
            whole = access.read_whole(contents.weights[name])
            if writer is not None and failure is None and name in mine:
                failure = None if writing is None else writing.exception()
                writing = thread.submit(writer.write, name, whole.cpu()) if failure is None else None
            del whole

    def finish() -> dict[str, list[int]]:
        if failure is not None:
            raise failure
        if writer is None:
            return {}
        if writing is not None:
            writing.result()
        record = writer.close()
        return {f"{layout.BASE}/{path.name}": [record.size, record.crc32]}

    try:
        return agreement.attempt(f"writing {beside.with_suffix('') / path.name}", finish)
    finally:
        if writer is not None:
            writer.abandon()


def _deal(entries: dict[str, atomic_files.Entry], ranks: int) -> dict[str, int]:
    """Which rank writes which weight: about as many bytes each."""
    load = [0] * ranks
    owner = {}
    for name in sorted(entries, key=lambda name: -entries[name].size):
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += entries[name].size
    return owner


def _file_name(rank: int) -> str:
    return f"weights-{rank:05d}.safetensors"
