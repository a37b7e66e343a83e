"""`accelerator.save_state` and `accelerator.load_state` for a LoSiA run.

    output_dir/              Accelerate's: schedulers, samplers, random states, registered objects; and losia_state.json, last
    _losia_state/<name>/     this package's, beside it: model, optimizer, conductor; the base once for all checkpoints

With `automatic_checkpoint_naming` Accelerate takes everything in project_dir/checkpoints for a checkpoint of its own, and
`_losia_state` is in project_dir. What counts is the pair: losia_state.json names the entry that was saved with it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper

from losia_dist.checkpoint import atomic_files, layout
from losia_dist.checkpoint.load import load_from
from losia_dist.checkpoint.save import check_between_steps, save_as
from losia_dist.checkpoint.session import session_of
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.errors import CheckpointError, ConfigError, UnsupportedError
from losia_dist.integrations.deepspeed.engine_checkpoint import EngineCounters
from losia_dist.run.conductor import LoSiA

MARKER = "losia_state.json"


def carry_state(accelerator: Any, losia: LoSiA) -> None:
    """Let `accelerator.save_state` and `load_state` carry the run of this conductor. Called once, by all ranks.

    After `accelerator.prepare(...)` and `LoSiA(...)`. Both calls keep their arguments, but for those that concern how
    Accelerate writes models, and are made by all ranks between optimizer steps; output directories lie on a file system that
    all ranks share. A run goes on bit for bit on the same engine and ranks.

    Raises:
        ConfigError: the accelerator prepared another model, or several.
    """
    if len(accelerator._models) != 1 or unwrap(accelerator._models[0]) is not unwrap(losia.model):
        raise ConfigError(
            f"the accelerator has prepared {len(accelerator._models)} models, and must have prepared the conductor's model "
            "alone: call accelerator.prepare(model, optimizer, ...), then LoSiA(...), then carry_state(accelerator, losia)."
        )
    engine = accelerator._models[0]
    if hasattr(engine, "micro_steps"):
        losia.carried["deepspeed"] = EngineCounters(engine)
    state = _AcceleratorState(accelerator, losia)
    accelerator.save_state, accelerator.load_state = state.save, state.load


class _AcceleratorState:
    def __init__(self, accelerator: Any, losia: LoSiA) -> None:
        self._accelerator, self._losia = accelerator, losia
        self._save, self._load = accelerator.save_state, accelerator.load_state
        self._agreement = session_of(losia).agreement

    def save(self, output_dir: Any = None, safe_serialization: bool = True, **options: Any) -> str:
        """In the place of `Accelerator.save_state`; returns the directory.

        Raises:
            CheckpointError: on every rank, as `save_checkpoint`; what was complete before stays so.
            UnsupportedError: arguments for how models are written.
        """
        _refuse(options)
        if output_dir is None and not self._is_automatic:
            raise ConfigError("save_state needs output_dir, unless automatic_checkpoint_naming is on.")
        accelerator = self._accelerator
        target = self._numbered / f"checkpoint_{accelerator.save_iteration}" if self._is_automatic else Path(output_dir)
        target = target.absolute()
        self._agreement.same("save_state's output_dir", str(target))
        what = f"saving to {target}"
        self._agreement.attempt(what, lambda: check_between_steps(self._losia))
        # An earlier save's must not make a pair with the files of this one.
        self._agreement.on_first(what, lambda: (target / MARKER).unlink(missing_ok=True))
        with self._without_models():
            location = self._save(output_dir, safe_serialization)
        state = self._state_of(target)
        save_as(state, target.name, self._losia, scheduler=self._engines_scheduler)

        def complete() -> None:
            entry = layout.find(state, name=target.name)
            atomic_files.write_text(target / MARKER, json.dumps({"manifest_crc32": entry.manifest_crc32}) + "\n")
            layout.remove_orphans(state, target.parent, target.name)

        self._agreement.on_first(what, complete)
        return str(location)

    def load(self, input_dir: Any = None, load_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        """In the place of `Accelerator.load_state`; without `input_dir` the newest one that is complete.

        Raises:
            CheckpointError: on every rank: a part of it is missing or damaged, or another run's; nothing has been changed.
            UnsupportedError: arguments for how models are read.
        """
        _refuse(options)
        if input_dir is None and not self._is_automatic:
            raise ConfigError("load_state needs input_dir, unless automatic_checkpoint_naming is on.")
        asked = None if input_dir is None else str(Path(input_dir).expanduser().absolute())
        self._agreement.same("load_state's input_dir", asked)
        source = Path(self._agreement.on_first(f"loading from {asked}", lambda: str(self._complete(asked))))
        load_from(self._state_of(source), self._losia, scheduler=self._engines_scheduler, name=source.name)
        with self._without_models():
            self._load(str(source), load_kwargs)

    def _complete(self, asked: str | None) -> Path:
        """The checkpoint that is asked for, or the newest, if both of its parts are there. Rank 0 looks."""
        if asked is not None:
            why = self._why_not(Path(asked))
            if why is not None:
                raise CheckpointError(f"{asked} cannot be loaded: {why}. Load another one.")
            return Path(asked)
        whole = [path for path in layout.numbered(self._numbered, "checkpoint_") if self._why_not(path) is None]
        if not whole:
            raise CheckpointError(
                f"no complete checkpoint of a LoSiA run in {self._numbered}. Check project_dir, or start anew."
            )
        return whole[-1].absolute()

    def _why_not(self, path: Path) -> str | None:
        state = self._state_of(path)
        try:
            recorded = json.loads((path / MARKER).read_text(encoding="utf-8"))["manifest_crc32"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"it has no {MARKER}: saving it did not finish, or it was saved without LoSiA's carry_state"
        entries = {c.name: c for c in layout.complete_checkpoints(state)}
        if path.name not in entries or entries[path.name].manifest_crc32 != recorded:
            return f"the state that was saved with it, {state / path.name}, is missing or another one"
        return None

    @property
    def _is_automatic(self) -> bool:
        return bool(self._accelerator.project_configuration.automatic_checkpoint_naming)

    @property
    def _numbered(self) -> Path:
        return Path(self._accelerator.project_dir) / "checkpoints"

    def _state_of(self, target: Path) -> Path:
        return (target.parent.parent if self._is_automatic else target.parent) / layout.BESIDE

    @property
    def _engines_scheduler(self) -> Any:
        """A scheduler that DeepSpeed made from its configuration, and that Accelerate leaves to the engine to save."""
        held = [s for s in self._accelerator._schedulers if isinstance(s, DeepSpeedSchedulerWrapper)]
        return held[0].scheduler if held else None

    @contextlib.contextmanager
    def _without_models(self) -> Iterator[None]:
        """Accelerate then writes and reads everything else."""
        accelerator = self._accelerator
        kept = accelerator._models, accelerator._optimizers
        accelerator._models, accelerator._optimizers = [], []
        try:
            yield
        finally:
            accelerator._models, accelerator._optimizers = kept


def _refuse(options: dict[str, Any]) -> None:
    if options:
        raise UnsupportedError(
            f"{', '.join(options)}: LoSiA's state is written and read as a whole, not by Accelerate; leave it out."
        )
