"""`save_checkpoint`: all of a run's state, from any engine, written so that the checkpoint before it is never at risk."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losia_dist._version import __version__
from losia_dist.checkpoint import atomic_files, content, layout, random_state, values
from losia_dist.checkpoint.base import Chain, write_base
from losia_dist.checkpoint.description import describe_model, describe_parts
from losia_dist.checkpoint.journal import Moved, read_blocks
from losia_dist.checkpoint.quantized import describe_quantized
from losia_dist.checkpoint.reader import state_file
from losia_dist.checkpoint.session import Session, check_parts, session_of
from losia_dist.checkpoint.tensor_names import Contents, contents_of
from losia_dist.errors import CheckpointError, ConfigError
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.conductor import LoSiA

_MARGIN = 1 << 20  # bytes: manifests, and what file systems round up


def save_checkpoint(
    directory: str | Path,
    *,
    model: Any,
    optimizer: Any,
    losia: LoSiA,
    scheduler: Any = None,
    extra: Any = None,
    step: int | None = None,
    keep_last: int | None = None,
    asynchronous: bool = False,
) -> Path:
    """Save the run into `directory`, a place of its own on a file system that all ranks share. Called by all ranks.

    The first save of a run writes every weight once; each one after it writes subnets, optimizer state and what moved since.
    Any engine and number of ranks can load it. Call between optimizer steps, after `losia.step()`.

    Args:
        directory: made if missing. A run saves to it again and again; two runs never share one.
        model, optimizer: as given to `LoSiA(...)`, wrapped or not.
        losia: the conductor.
        scheduler: learning rate scheduler with state_dict, if the run has one.
        extra: the caller's own plain values and tensors (a data position, ...); rank 0's are kept and given back on every rank.
        step: names the checkpoint; None: the conductor's count of optimizer steps.
        keep_last: delete all but the newest `keep_last` steps once this one is complete; None keeps all.
        asynchronous: copy to host memory, write in a thread and return. The next save or load waits for it and raises its
            failure; `wait_for_saving` does so at a run's end.

    Returns:
        the checkpoint's own directory.

    Raises:
        CheckpointError: on every rank: no space, a failed write, in mid accumulation, or another run's directory. The
            checkpoints that were complete stay as they are.
        ConfigError: arguments that do not belong together.
    """
    check_parts(losia, model, optimizer)
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise ConfigError(f"step={step!r}: a whole number of at least 0 is needed, or None for the conductor's count.")
    name = layout.step_name(losia.steps if step is None else step)
    options: dict[str, Any] = {"keep_last": keep_last, "asynchronous": asynchronous}
    return save_as(directory, name, losia, scheduler=scheduler, extra=extra, **options)


def save_as(
    directory: str | Path,
    name: str,
    losia: LoSiA,
    *,
    scheduler: Any = None,
    extra: Any = None,
    keep_last: int | None = None,
    asynchronous: bool = False,
    is_latest: bool = True,
) -> Path:
    """`save_checkpoint` under a name of the caller's choice; `is_latest` False: not the one that is resumed by default."""
    if keep_last is not None and (not isinstance(keep_last, int) or isinstance(keep_last, bool) or keep_last < 1):
        raise ConfigError(f"keep_last={keep_last!r}: a whole number of at least 1 is needed, or None to keep all.")
    if not layout.NAME.fullmatch(name) or name in (layout.BASE, layout.JOURNAL, layout.LATEST) or layout.is_leftover(name):
        raise ConfigError(f"{name!r} cannot name a checkpoint: use letters, digits, '-', '_' and '.', not base or journal.")
    directory = Path(directory).absolute()
    session = session_of(losia)
    session.wait()
    agreement = session.agreement
    agreement.same("what save_checkpoint was asked for", [str(directory), name, keep_last, asynchronous, is_latest])
    what = f"saving to {directory}"
    agreement.attempt(what, lambda: check_between_steps(losia))
    losia.parameters.reshard()
    contents = contents_of(losia)
    tensors: dict[str, Tensor] = {}
    # Encoded on every rank, so that each finds the error; kept by rank 0.
    plain = agreement.attempt(what, lambda: content.read_values(losia, scheduler, extra, tensors))
    tensors = tensors if agreement.rank == 0 else {}
    agreement.on_first(what, lambda: directory.mkdir(parents=True, exist_ok=True))
    agreement.attempt(what, lambda: _check_visible(directory))
    chain = _chain(session, directory, losia, contents)
    chain.pending.update(chain.unsaved)
    chain.unsaved = Moved()
    tensors |= content.read_tensors(losia, contents, agreement.rank, agreement.world_size, copies=asynchronous)
    writing = _Writing(
        name=name,
        chain=chain,
        agreement=agreement,
        tensors=tensors,
        random=agreement.attempt(
            what, lambda: json.dumps(values.encode(random_state.read(), tensors, "random", "the random state"))
        ),
        moved=chain.pending,
        blocks=read_blocks(chain.pending, losia.parameters, agreement.rank, agreement.world_size),
        manifest={
            "run": chain.run,
            "base_crc32": chain.base_crc32,
            "step": losia.steps,
            "world_size": agreement.world_size,
            "engine": f"{type(losia.parameters).__name__}, {type(losia.state).__name__}",
            "optimizer": type(losia.state.optimizer).__name__,
            "versions": {"losia_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "losia_config": losia.config.to_dict(),
            **describe_parts(losia, contents),
            "quantized": describe_quantized(losia.parameters, contents.quantized),
            "values": plain,
        },
        keep_last=keep_last,
        is_latest=is_latest,
    )
    chain.pending = Moved()
    if asynchronous:
        session.start(writing.run)
    else:
        writing.run()
    return directory / name


@dataclass
class _Writing:
    """One save whose contents are in host memory: touches neither the model nor the device."""

    name: str
    chain: Chain
    agreement: Agreement
    tensors: dict[str, Tensor]
    random: str
    moved: Moved
    blocks: dict[str, Tensor]  # this rank's share of what is to be read in the places of `moved`
    manifest: dict[str, Any]
    keep_last: int | None
    is_latest: bool

    def run(self) -> None:
        """Write this rank's files; then rank 0 completes the checkpoint. Communicates over the agreement only."""
        identity = self.agreement.gather(uuid.uuid4().hex[:12])[0]
        beside = self.chain.directory / f"{self.name}.tmp-{identity}"
        journal = f"{layout.JOURNAL}/{self.name}-{identity}-{self.agreement.rank:05d}.safetensors"
        done = False
        try:
            self._write(beside, journal, identity)
            done = True
        finally:
            if not done:
                self.chain.unsaved = self.moved  # subnets may have moved on meanwhile: the next save puts both together
                with contextlib.suppress(OSError):
                    atomic_files.remove(self.chain.directory / journal)
                    if self.agreement.rank == 0:
                        atomic_files.remove(beside)

    def _write(self, beside: Path, journal: str, identity: str) -> None:
        what = f"saving to {self.chain.directory}"
        size = sum(tensor.nbytes for tensor in [*self.tensors.values(), *self.blocks.values()])
        total = sum(self.agreement.gather(size)) + _MARGIN

        def prepare() -> None:
            atomic_files.check_space(self.chain.directory, total)
            if self.agreement.rank == 0:
                beside.mkdir()
                (self.chain.directory / layout.JOURNAL).mkdir(exist_ok=True)

        def write() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
            name = state_file(self.agreement.rank)
            state = atomic_files.write_tensors(beside / name, self.tensors, {"random": self.random})
            if not self.blocks:
                return {name: [state.size, state.crc32]}, {}
            left = atomic_files.write_tensors(self.chain.directory / journal, self.blocks)
            atomic_files.sync_directory(self.chain.directory / layout.JOURNAL)
            return {name: [state.size, state.crc32]}, {journal: [left.size, left.crc32]}

        self.agreement.attempt(what, prepare)
        written = self.agreement.gather(self.agreement.attempt(what, write))
        states = {name: record for state, _ in written for name, record in state.items()}
        journals = {**self.chain.journal, **{name: record for _, part in written for name, record in part.items()}}
        self.agreement.on_first(what, lambda: self._complete(beside, states, journals, identity))
        self.chain.journal = journals

    def _complete(self, beside: Path, states: dict[str, list[int]], journals: dict[str, list[int]], identity: str) -> None:
        """Rank 0: manifest, the final name, the marker; only then is anything older taken away."""
        self.chain.check_still_there()
        manifest = layout.write_manifest(beside, {**self.manifest, "files": states, "journal": journals})
        final, replaced = self.chain.directory / self.name, self.chain.directory / f"{self.name}.replaced-{identity}"
        try:
            if final.exists():
                atomic_files.rename_directory(final, replaced)
            atomic_files.rename_directory(beside, final)
            layout.mark_complete(final, manifest, self.is_latest)
        except OSError:
            # Nothing that is reported as failed may count, even if only the last sync was missing.
            with contextlib.suppress(OSError):
                if not beside.exists():  # the new one has taken the name
                    (final / layout.COMPLETE).unlink(missing_ok=True)
                    atomic_files.remove(final)
            with contextlib.suppress(OSError):
                if replaced.exists() and not final.exists():
                    os.replace(replaced, final)
            raise
        # The checkpoint counts from here on: what follows is tidying, and its failure is not the save's.
        with contextlib.suppress(OSError):
            if self.is_latest:
                atomic_files.write_text(self.chain.directory / layout.LATEST, self.name + "\n")
            layout.remove_unneeded(self.chain.directory, self.keep_last)


def _chain(session: Session, directory: Path, losia: LoSiA, contents: Contents) -> Chain:
    """The chain this run continues in the directory; its first save there writes the base."""
    agreement = session.agreement
    chain = session.chains.get(directory)
    if chain is not None:
        agreement.on_first(f"saving to {directory}", chain.check_still_there)
        return chain
    agreement.on_first(f"saving to {directory}", lambda: _check_free(directory))
    losia.consolidate()
    description = agreement.on_first(f"saving to {directory}", lambda: describe_model(losia.model, contents))
    chain = write_base(directory, contents, losia.parameters, agreement, description)
    session.chains[directory] = chain
    return chain


def _check_free(directory: Path) -> None:
    found = layout.complete_checkpoints(directory)
    if found:
        raise CheckpointError(
            f"{directory} holds checkpoints of another run ({found[-1].path.name} ...). Load from it first to continue that "
            "run, or save into another directory."
        )
    base = directory / layout.BASE
    if base.exists():
        layout.read_manifest(base)  # a directory of that name that is not ours is not overwritten
    for path in list(directory.iterdir()):
        if layout.is_leftover(path.name):
            atomic_files.remove(path)


def check_between_steps(losia: LoSiA) -> None:
    """Refuse to save in mid accumulation, or after a step that was not finite.

    Raises:
        CheckpointError: on the ranks that are.
        DivergenceError: as `LoSiA.check_latest_step`.
    """
    losia.check_latest_step()
    if losia.in_mid_step:
        raise CheckpointError(
            "a checkpoint was asked for in the middle of an optimizer step (micro-batches were run, or losia.step() was not "
            "called yet): gradients are not saved. Save after optimizer.step() and losia.step()."
        )


def _check_visible(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} was made by rank 0 but is not there: all ranks must share one file system.")
    probe = directory / f"probe.tmp-{uuid.uuid4().hex}"
    try:
        probe.touch()
    finally:
        atomic_files.remove(probe)
