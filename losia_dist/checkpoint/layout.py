"""Where a run's checkpoints lie in their directory, which of them are complete, and what their manifests say.

    base/                    every weight that does not train, as it stood when the run first saved here: written once
    journal/*.safetensors    subnets that moved on since: the values they left in the weights, a file a save and rank
    step-00000100/           state-<rank>.safetensors, manifest.json, and COMPLETE once all of it is durable
    latest                   name of the newest complete one, for people and tools

base + the journal files that a manifest lists, in their order, + its subnets = the whole weights, exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losia_dist.checkpoint import atomic_files
from losia_dist.errors import CheckpointError

FORMAT = 1
# Where to look in a run's output directory: the training script's checkpoints; those of Trainer and Accelerate, whose own
# directories (checkpoint-12) lie beside. Trainer's uploads of output_dir to the Hub leave out what begins with "_".
OF_SCRIPT, BESIDE = "checkpoints", "_losia_state"
OF_MODEL = "model"  # where the training script leaves the trained model
BASE, JOURNAL, LATEST = "base", "journal", "latest"
MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
_LEFTOVER = re.compile(r".*\.(tmp|replaced)-[0-9a-f]+")
_KIND = "losia_dist checkpoint"


@dataclass(frozen=True)
class Complete:
    """A checkpoint whose COMPLETE marker is there. `sequence` grows with every save into the directory."""

    path: Path
    sequence: int
    is_latest: bool  # False: saved with the wish not to be the one that is resumed by default
    manifest_crc32: int

    @property
    def name(self) -> str:
        """What it is asked for by, also while it is being replaced."""
        return self.path.name.partition(".replaced-")[0]


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def complete_checkpoints(directory: Path) -> list[Complete]:
    """Complete checkpoints of a directory, oldest first; whatever is half written or not a checkpoint is passed over."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in directory.iterdir():
            marker = None if ".tmp-" in path.name else _read_marker(path)
            # One that is being replaced counts only for as long as its successor does not.
            replaced = path.name.partition(".replaced-")
            if marker is not None and (not replaced[1] or _read_marker(directory / replaced[0]) is None):
                found.append(marker)
    return sorted(found, key=lambda complete: complete.sequence)


def find(directory: Path, name: str | None = None) -> Complete:
    """The newest complete checkpoint, or the one of a name.

    Raises:
        CheckpointError: there is none, with those that there are.
    """
    found = complete_checkpoints(directory)
    wanted = [complete for complete in found if (complete.is_latest if name is None else complete.name == name)]
    if not wanted:
        there = ", ".join(complete.path.name for complete in found[-5:]) or "none at all"
        where = str(directory) if directory.is_dir() else f"{directory} (the directory does not exist)"
        what = "complete checkpoint" if name is None else f"complete checkpoint {name}"
        raise CheckpointError(f"no {what} in {where}: complete there: {there}. Check the path, or start anew.")
    return wanted[-1]


def locate(path: str | Path) -> Complete:
    """What a user means by a path: the newest complete checkpoint of a directory of checkpoints or of a run's output directory;
    or one checkpoint: a step's own directory, or Trainer's or Accelerate's, whose state lies beside it.

    Raises:
        CheckpointError: there is none, and where it was looked for.
    """
    path = Path(path)
    if (path / COMPLETE).is_file():
        return find(path.parent, name=path.name)
    beside = [path.absolute().parent / BESIDE]
    if beside[0].parent.name == OF_SCRIPT:  # Accelerate with automatic_checkpoint_naming
        beside.append(beside[0].parent.parent / BESIDE)
    for state in beside:
        if path.is_dir() and path.name in [complete.path.name for complete in complete_checkpoints(state)]:
            return find(state, name=path.name)
    inside = [path, path / OF_SCRIPT, path / BESIDE]
    for directory in inside:
        if any(complete.is_latest for complete in complete_checkpoints(directory)):
            return find(directory)
    there = complete_checkpoints(beside[0])
    if there and path.is_dir():
        raise CheckpointError(
            f"{path} is none of the checkpoints whose state is in {beside[0]} ("
            f"{', '.join(complete.path.name for complete in there[-5:])}). Give {path.parent}, for the newest, or one of them."
        )
    if (path / OF_MODEL / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds no checkpoint: its run was without --save_steps, or has saved none yet. Its trained model is in "
            f"{path / OF_MODEL}, a plain Transformers directory: use it as it is, copy it, or train on from it with --model."
        )
    return find(next((directory for directory in reversed(inside) if directory.is_dir()), path))


def is_leftover(name: str) -> bool:
    """Whether a name is that of something a save did not finish, or was replacing."""
    return _LEFTOVER.fullmatch(name) is not None


def write_manifest(path: Path, content: dict[str, Any]) -> atomic_files.FileRecord:
    """Write a manifest of this format into a directory."""
    return atomic_files.write_text(path / MANIFEST, json.dumps({"kind": _KIND, "format": FORMAT, **content}, indent=1) + "\n")


def mark_complete(path: Path, manifest: atomic_files.FileRecord, is_latest: bool) -> None:
    """The last write of a save: from here on the checkpoint counts, as the newest."""
    before = complete_checkpoints(path.parent)
    marker = {"sequence": before[-1].sequence + 1 if before else 1, "latest": is_latest, "manifest_crc32": manifest.crc32}
    atomic_files.write_text(path / COMPLETE, json.dumps(marker) + "\n")


def read_manifest(path: Path, crc32: int | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint or of a base.

    Raises:
        CheckpointError: missing, damaged, not this package's, or of a newer format.
    """
    file = path / MANIFEST
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: {path} is not a checkpoint of this package, or was damaged.") from None
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise CheckpointError(
            f"{file} is damaged: its checksum is not the one that was saved. Restore it, or load another step."
        )
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise CheckpointError(f"{file} is not a manifest of this package: {path} is foreign, or damaged. Check the path.")
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {content['format']}; this version reads up to {FORMAT}. Upgrade losia_dist (it was "
            f"saved by {content.get('versions', {}).get('losia_dist', 'a newer version')})."
        )
    return content


def check_files(directory: Path, records: dict[str, list[int]], mine: slice) -> None:
    """Every file that a manifest lists (path in the directory -> size and CRC-32) is there and whole.

    Sizes are compared for all of them, checksums for this rank's share `mine`.

    Raises:
        CheckpointError: the first file that is missing, truncated or damaged.
    """
    for name, (size, _) in records.items():
        try:
            found = os.stat(directory / name).st_size
        except FileNotFoundError:
            raise CheckpointError(f"{directory / name} is missing. Restore it, or load another step.") from None
        if found != size:
            raise CheckpointError(f"{directory / name} has {found} bytes instead of {size}: truncated or overwritten.")
    for name in sorted(records)[mine]:
        if atomic_files.checksum(directory / name) != records[name][1]:
            raise CheckpointError(f"{directory / name} is damaged: its checksum differs. Restore it, or load another step.")


def remove_unneeded(directory: Path, keep_last: int | None) -> None:
    """Take out older steps beyond `keep_last`, what unfinished saves left, and journal files that no manifest lists."""
    found = complete_checkpoints(directory)
    steps = [complete.path for complete in found if complete.path.name.startswith("step-")]
    for path in steps[:-keep_last] if keep_last else []:
        (path / COMPLETE).unlink(missing_ok=True)  # first, so that a half-deleted one never counts
        atomic_files.remove(path)
    for path in list(directory.iterdir()):
        if is_leftover(path.name):
            atomic_files.remove(path)
    needed = set()
    for complete in complete_checkpoints(directory):
        try:
            needed |= set(read_manifest(complete.path)["journal"])
        except CheckpointError:
            return  # what a damaged manifest needs is unknown
    for path in (directory / JOURNAL).glob("*"):
        if f"{JOURNAL}/{path.name}" not in needed:
            atomic_files.remove(path)


def remove_orphans(directory: Path, beside: Path, kept: str | None) -> None:
    """Delete the checkpoints that have no directory of their name in `beside`, all but `kept`, and journal files that no other
    needs. What fails is left for the next time."""
    gone = [one.path for one in complete_checkpoints(directory) if one.name != kept and not (beside / one.name).is_dir()]
    with contextlib.suppress(OSError):
        for path in gone:
            (path / COMPLETE).unlink(missing_ok=True)  # first, so that a half-deleted one never counts
            atomic_files.remove(path)
        if gone:
            remove_unneeded(directory, None)


def numbered(directory: Path, prefix: str) -> list[Path]:
    """Directories that are called `prefix` and a number, by number: Trainer's and Accelerate's checkpoints."""
    found = [path for path in directory.glob(f"{prefix}*") if path.is_dir() and path.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def _read_marker(path: Path) -> Complete | None:
    try:
        marker = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        return Complete(path, marker["sequence"], marker["latest"], marker["manifest_crc32"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
