"""What an earlier run of the script left in --output_dir: found before anything is read, and deleted only with --overwrite.

Then only what the script wrote goes, and only when nothing can be refused any more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from losia_dist.checkpoint import layout
from losia_dist.data import places_of
from losia_dist.errors import ConfigError
from losia_dist.run.log_files import FACTS, MEMORY, METRICS, SUBNETS, SUMMARY

MODEL, MODEL_FILES, _CURVES = layout.OF_MODEL, "model_files.json", "tensorboard"
_EVENTS = ("events.out.tfevents.*",)
_LOGS = (METRICS, SUBNETS, SUMMARY)
_SOURCES = ("train_file", "eval_file")  # options that, as --model, may name what is in here
# COMPLETE first, so that a half-deleted one never counts.
_OF_CHECKPOINTS = (layout.COMPLETE, layout.MANIFEST, "state-*.safetensors", "weights-*.safetensors", "step-*.safetensors")


class OutputDirectory:
    """Made anywhere; rank 0 alone calls the methods, which change nothing unless they say so."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self.path = options, Path(options.output_dir)
        self.model, self._checkpoints = self.path / MODEL, self.path / layout.OF_SCRIPT
        self._lock = FileLock(self.path / ".lock")
        self._theirs: set[str] = set()

    def check(self, source: Path | None, continues: bool, may_start_anew: bool) -> None:
        """Refuse what this run would mix with, or write over.

        Args:
            source: the checkpoint that this run goes on from.
            continues: it is one of this directory's.
            may_start_anew: --resume auto: logs of a start that came to nothing are in nobody's way.

        Raises:
            ConfigError: an earlier run is in here; or --overwrite would delete what this run reads, or is not the script's.
        """
        try:
            found = [] if continues and not self._options.overwrite else self._earlier()
        except OSError as error:
            raise ConfigError(f"--output_dir {self._options.output_dir} cannot be read: {error}.") from error
        if source is None and may_start_anew and FACTS in found and not {MODEL, SUMMARY} & set(found):
            return
        if found and self._options.overwrite:
            self._check_overwriting(found, source)
        elif found:
            going_on = "go on from it with --resume, " if layout.complete_checkpoints(self._checkpoints) else ""
            raise ConfigError(
                f"--output_dir {self._options.output_dir} holds an earlier run ({', '.join(found)}): {going_on}give another "
                "--output_dir, or have what that run wrote deleted with --overwrite (and no --resume)."
            )

    def hold(self) -> None:
        """Let no other run write here while this process lives. Makes the directory, and a file in it.

        Raises:
            ConfigError: another run does, on this machine or (where the file system tells) another.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"--output_dir {self._options.output_dir}: another run is writing there now. Give another --output_dir, or "
                "wait for its end."
            ) from error
        except (OSError, NotImplementedError):  # a file system without locks: as before there were any
            pass

    def release(self) -> None:
        """The run is over."""
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def clear(self) -> None:
        """Delete the earlier run's logs, and with --overwrite all that the script wrote. No file of anybody else, and no
        directory that has one in it.

        Raises:
            ConfigError: something cannot be deleted.
        """
        try:
            if self._options.overwrite:
                for path in self._parts_of_checkpoints():
                    _remove(path, _OF_CHECKPOINTS)
                _remove(self._checkpoints, (layout.LATEST,), deep=False)
                _remove(self.model, tuple(self._recorded()), by_path=True)
                (self.path / MODEL_FILES).unlink(missing_ok=True)
            _remove(self.path / _CURVES, _EVENTS)
            for name in (*_LOGS, MEMORY, FACTS):  # what says whose all this is goes last
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--output_dir {self._options.output_dir}: {error}; nothing was trained.") from error

    def note_others(self) -> None:
        """Before the model is written: remember which files in its directory are not the script's."""
        self._theirs = _files(self.model) - self._recorded()

    def record_model(self) -> None:
        """After it was written: keep the names of its files, for --overwrite. Writes model_files.json.

        Raises:
            OSError: it cannot be written.
        """
        names = sorted(_files(self.model) - self._theirs)
        (self.path / MODEL_FILES).write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")

    def _earlier(self) -> list[str]:
        found = [name for name in (FACTS, *_LOGS) if (self.path / name).exists()]
        found += [_CURVES] if any((self.path / _CURVES).glob(_EVENTS[0])) else []
        return found + [path.name for path in (self._checkpoints, self.model) if _files(path)]

    def _check_overwriting(self, found: list[str], source: Path | None) -> None:
        if not (self.path / FACTS).is_file():
            raise ConfigError(
                f"--overwrite: {', '.join(found)} in --output_dir {self._options.output_dir} were not written by this script, "
                f"which leaves {FACTS} beside them. Move them away, or give another --output_dir."
            )
        if MODEL in found and not self._recorded():
            raise ConfigError(
                f"--overwrite: whether {self.model} is this script's is not known: {MODEL_FILES} is not there. Move it "
                "away, or delete it."
            )
        read = [(f"--model {self._options.model}", Path(self._options.model))]
        for name in _SOURCES:
            given = getattr(self._options, name) or ()
            read += [(f"--{name} {one}", path) for one in given for path in places_of(one)]
        if source is not None:
            read.append((f"--resume {self._options.resume}", source))
        for named, path in read:
            place = path.resolve()
            if {self.model.resolve(), self._checkpoints.resolve()} & {place, *place.parents}:
                raise ConfigError(f"--overwrite would delete {named}: give another --output_dir.")

    def _recorded(self) -> set[str]:
        with contextlib.suppress(OSError, ValueError):
            names = json.loads((self.path / MODEL_FILES).read_text(encoding="utf-8"))
            if isinstance(names, list):
                return {name for name in names if isinstance(name, str)}
        return set()

    def _parts_of_checkpoints(self) -> Iterator[Path]:
        yield from sorted(self._checkpoints.glob("step-*"), reverse=True)
        yield from (path for path in self._checkpoints.glob("*") if layout.is_leftover(path.name))
        yield from (self._checkpoints / layout.BASE, self._checkpoints / layout.JOURNAL)


def _files(directory: Path) -> set[str]:
    """Paths of the files in a directory, links to directories not followed."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()}


def _remove(directory: Path, patterns: tuple[str, ...], *, deep: bool = True, by_path: bool = False) -> None:
    """Delete the files of these names (with by_path: of these paths), in the patterns' order, and what is then empty."""
    if not directory.is_dir():
        return
    if by_path:
        found = [directory / name for name in sorted(_files(directory) & set(patterns))]
    else:
        found = [path for pattern in patterns for path in (directory.rglob(pattern) if deep else directory.glob(pattern))]
    for path in found:
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
            for above in path.relative_to(directory).parents:
                with contextlib.suppress(OSError):  # another file is in it, or it is a link
                    (directory / above).rmdir()
