"""Whether output_dir can be written, by every rank in the same place, and holds what a run writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from losia_dist.digits import short
from losia_dist.tools.doctor.findings import Finding, error, ok, warning, who

GB = 1e9
# Of the model's size on disk, in bf16 and at rank factor 1/8: base 1, trained model 1, and four steps (three kept, one being
# written) of 0.15: 12 bytes for 1/64 of the weights, and the localizing layers' importance. See docs/checkpoints.md.
_TIMES_MODEL = 2.6


def check_storage(output_dir: str, model: str | None) -> list[Finding]:
    """Write access and free space. Each rank by itself; leaves nothing behind, and makes no directory that was not there."""
    existing = _existing(output_dir)
    if not existing.is_dir():
        return [error("output_dir", f"{output_dir} lies under {existing}, which is a file.", "give another --output_dir")]
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".losia-doctor-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as problem:
        return [error("output_dir", f"{existing} cannot be written: {problem}.", "give another --output_dir, or its rights")]
    target, free = Path(output_dir).absolute(), shutil.disk_usage(existing).free
    size = sum(path.stat().st_size for path in _weights(Path(model))) if model else 0
    if not size:
        found = [ok("output_dir", f"{target} can be written; {short(free / GB)} GB free")]
        unknown = f"{model} is no directory with weights here, so its size is not known."
        return found + ([warning("model", unknown, "download it first")] if model else [])
    needed = _TIMES_MODEL * size
    text = f"{short(free / GB)} GB free at {target}; {short(needed / GB)} GB are needed for a model of {short(size / GB)} GB"
    if free < needed:
        fix = "free some, or give another --output_dir; --keep_last 1 needs 30 % of the model's size less"
        return [error("output_dir", f"{text} (base, trained model, four steps).", fix)]
    return [ok("output_dir", text)]


def _weights(model: Path) -> list[Path]:
    """A model directory's files of weights, in one format."""
    return [*model.glob("*.safetensors")] or [*model.glob("*.bin")]


def _existing(output_dir: str) -> Path:
    """The directory itself, or the nearest above that is there."""
    target = Path(output_dir).absolute()
    return next(path for path in (target, *target.parents) if path.exists())


def leave_mark(output_dir: str, token: str) -> Path | None:
    """A file in the nearest existing directory, for `sees_mark` on the other ranks; None: it cannot be written."""
    mark = _existing(output_dir) / f".losia-doctor-{token}"
    try:
        mark.touch()
    except OSError:
        return None
    return mark


def sees_mark(mark: Path) -> bool:
    """Whether the first rank's mark is here too. Listing the directory makes network file systems look again."""
    try:
        return mark.name in os.listdir(mark.parent)
    except OSError:
        return False


def check_shared(output_dir: str, seen: list[bool]) -> list[Finding]:
    """seen: by rank, whether it saw the first rank's mark."""
    if all(seen):
        return []
    blind = who([rank for rank, there in enumerate(seen) if not there])
    text = f"{output_dir} is not one directory: {blind} do not see what rank 0 writes there, and checkpoints are lost."
    return [error("output_dir", text, "a file system that all nodes share, mounted at one path")]
