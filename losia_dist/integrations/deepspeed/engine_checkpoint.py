"""`engine.save_checkpoint` and `engine.load_checkpoint` of a DeepSpeed engine, with this package's checkpoints behind them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from losia_dist.checkpoint import layout
from losia_dist.checkpoint.load import load_from
from losia_dist.checkpoint.save import save_as
from losia_dist.checkpoint.session import session_of
from losia_dist.errors import UnsupportedError

logger = logging.getLogger(__name__)


class EngineCounters:
    """What an engine counts itself; carried in every checkpoint of its conductor."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        names = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
        accumulation = self._engine.gradient_accumulation_steps()
        return {**{name: getattr(self._engine, name) for name in names}, "accumulation": accumulation}

    def load_state_dict(self, state: dict[str, int] | None, steps: int) -> None:
        """Count on from there; None: another kind of engine saved, after `steps` optimizer steps."""
        engine = self._engine
        if state is None:
            state = {"global_steps": steps, "global_samples": steps * engine.train_batch_size(), "skipped_steps": 0}
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, state[name])
        accumulation = engine.gradient_accumulation_steps()
        # Another number of micro-batches a step: the next one is the first of a step all the same.
        same = state.get("accumulation") == accumulation
        engine.micro_steps = state["micro_steps"] if same else state["global_steps"] * accumulation


def attach_checkpoints(engine: Any) -> None:
    """Replace the engine's two methods, whose signatures and results stay DeepSpeed's, and refuse the one that would save a
    model without what its subnets learned. `engine.losia` is there already."""
    engine.losia.carried["deepspeed"] = EngineCounters(engine)

    def save_checkpoint(
        save_dir: Any,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        **options: Any,
    ) -> bool:
        """Save into `save_dir/tag` (None: global_step<N>); `save_latest` False: not resumed from by default. All ranks call.

        `keep_last` and `asynchronous` are `losia_dist.save_checkpoint`'s.
        """
        if exclude_frozen_parameters:
            raise UnsupportedError(
                "exclude_frozen_parameters=True: the frozen weights hold what earlier subnets learned. They are written once "
                "for all of a run's checkpoints; leave the argument out."
            )
        name = f"global_step{engine.global_steps}" if tag is None else str(tag)
        options.update(scheduler=engine.lr_scheduler, extra=client_state, is_latest=save_latest)
        save_as(save_dir, name, engine.losia, **options)
        return True

    def load_checkpoint(
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, Any]:
        """(path, client_state) of the checkpoint that was loaded; (None, None) where there is none at all. All ranks call."""
        if not (load_module_strict and load_optimizer_states) or load_module_only or custom_load_fn is not None:
            raise UnsupportedError(
                "a LoSiA run is resumed as a whole: leave load_module_strict, load_optimizer_states, load_module_only and "
                "custom_load_fn at their defaults. To start a new run from its weights, export the checkpoint (export_model)."
            )
        directory, agreement = Path(load_dir), session_of(engine.losia).agreement
        what = f"looking for checkpoints in {directory}"
        if tag is None and not agreement.on_first(what, lambda: bool(layout.complete_checkpoints(directory))):
            logger.warning("no complete checkpoint in %s: nothing was loaded.", directory)
            return None, None
        path, client_state = load_from(
            directory,
            engine.losia,
            scheduler=engine.lr_scheduler,
            name=None if tag is None else str(tag),
            skip_scheduler=not load_lr_scheduler_states,
        )
        return str(path), client_state if client_state is not None else {}

    def save_16bit_model(*args: Any, **kwargs: Any) -> bool:
        """Refused, and so is `save_fp16_model`, which calls it."""
        raise UnsupportedError(
            "engine.save_16bit_model would write frozen weights without their subnets' present values, and LoSiA's own "
            "tensors: use losia_dist.export_model(engine.losia, directory), which writes safetensors in the model's dtype."
        )

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    engine.save_16bit_model = save_16bit_model
