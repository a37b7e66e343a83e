"""The training script's checkpoints, in output_dir/checkpoints: the one that a run goes on from, and those that it saves."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from losia_dist.checkpoint import layout
from losia_dist.checkpoint.load import load_from
from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.save import save_checkpoint
from losia_dist.checkpoint.session import wait_for_saving
from losia_dist.errors import CheckpointError
from losia_dist.ranks.agreement import Agreement
from losia_dist.recipe import trajectory
from losia_dist.recipe.engines import Engine
from losia_dist.recipe.output_directory import OutputDirectory
from losia_dist.recipe.trajectory import Progress

NEVER, AUTO, NEWEST = "never", "auto", "newest"  # of --resume; everything else is a path
_KIND = "losia_dist training"


@dataclass(frozen=True)
class Source:
    """A checkpoint to go on from. is_own: it lies where this run saves. extra: what `Checkpoints.save` put into it."""

    directory: str
    name: str
    step: int
    is_own: bool
    extra: dict[str, Any]

    @property
    def path(self) -> str:
        return str(Path(self.directory) / self.name)


class Checkpoints:
    """Made on every rank; methods are called by all ranks in the same order.

    Args:
        options: of the script, checked.
        output: their --output_dir.
        agreement: of all ranks.
    """

    def __init__(self, options: argparse.Namespace, output: OutputDirectory, agreement: Agreement) -> None:
        self.options, self._output, self._agreement = options, output, agreement
        self.directory = Path(options.output_dir).absolute() / layout.OF_SCRIPT
        self.source: Source | None = None
        self.saves = options.save_steps > 0
        self._trajectory: dict[str, Any] = {}

    def choose(self) -> None:
        """Settle on `source`, before anything large is read. Rank 0 looks.

        Raises:
            CheckpointError: what --resume names is not there, or cannot be resumed from.
            ConfigError: another run is where this one is to write (`OutputDirectory.check`).
        """
        self.source = self._agreement.on_first(None, self._find)

    def check(self, described: dict[str, Any]) -> None:
        """Compare what decides how the run goes on (`trajectory.describe`) with the checkpoint's.

        Raises:
            ConfigError: the first difference.
        """
        self._trajectory = described
        if self.source is not None:
            trajectory.check_same(self.source.extra["trajectory"], described, self.source.step, self.source.path)

    def load(self, run: Engine) -> Progress:
        """Put the engine to where the checkpoint was saved; without one, nothing happens.

        Raises:
            CheckpointError: it is damaged, or another model's or configuration's; nothing has been changed.
        """
        if self.source is None:
            return Progress()
        assert run.losia is not None
        saves_on = self.saves and self.source.is_own
        load_from(self.source.directory, run.losia, scheduler=run.scheduler, name=self.source.name, saves_on=saves_on)
        return Progress(**self.source.extra["progress"])

    def are_due(self, step: int, steps: int) -> bool:
        """Whether to save after this step: every `save_steps`, and after the last one."""
        return self.saves and (step % self.options.save_steps == 0 or step == steps)

    def save(self, run: Engine, progress: Progress, summary: dict[str, Any]) -> Path:
        """Save the run between two steps, with the part of its summary that is not measured again.

        Raises:
            CheckpointError: nothing was saved; what was complete before is untouched.
        """
        kept = {key: summary[key] for key in ("held_out_loss_before", "samples_before", "train_loss") if key in summary}
        return save_checkpoint(
            self.directory,
            **run.checkpoint_parts(),
            extra={"kind": _KIND, "trajectory": self._trajectory, "progress": asdict(progress), "summary": kept},
            keep_last=self.options.keep_last,
            asynchronous=self.options.async_save,
        )

    def wait(self, run: Engine) -> None:
        """Wait for a save in the background. Raises: CheckpointError: it failed."""
        if run.losia is not None:
            wait_for_saving(run.losia)

    def _find(self) -> Source | None:
        asked = self.options.resume
        own = layout.complete_checkpoints(self.directory)
        if asked == NEVER or (asked == AUTO and not own):
            found = None
        elif asked in (AUTO, NEWEST):
            try:
                found = layout.find(self.directory)
            except CheckpointError as error:
                raise CheckpointError(f"--resume: {error} (--resume auto starts anew where there is none.)") from error
        else:
            found = layout.locate(asked)
        is_own = found is not None and found.path.parent.resolve() == self.directory.resolve()
        self._output.check(None if found is None else found.path, continues=is_own, may_start_anew=asked == AUTO)
        return None if found is None else self._read(found, is_own)

    def _read(self, found: layout.Complete, is_own: bool) -> Source:
        manifest = Reader(found).manifest
        extra = manifest["values"]["extra"]
        if not isinstance(extra, dict) or extra.get("kind") != _KIND:
            raise CheckpointError(
                f"--resume: {found.path} was not saved by this script, so its place in the data is not known. Resume it where "
                "it was saved, or export it (losia-dist export) and start a new run from the exported model."
            )
        directory = self.directory if is_own else found.path.parent.absolute()  # one directory has one name
        return Source(str(directory), found.name, manifest["step"], is_own, extra)
