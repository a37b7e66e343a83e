"""What `evaluate()`, `predict()` and an earlier `train()` leave on a model, so that training wraps it as if they had not been.

Accelerate marks a model that it prepared for evaluation, unwrapped, as prepared, and then never wraps it for training: under
DDP no gradient is reduced. Under DeepSpeed the Trainer keeps an engine that it has destroyed itself, and takes the optimizer
out of the configuration (transformers 5.24, `evaluation_loop`, `_inner_training_loop`; accelerate 1.15, `prepare_model`).
"""

from __future__ import annotations

import copy
from typing import Any

from losia_dist.errors import UnsupportedError

_PREPARED = "_is_accelerate_prepared"


def engine_settings(trainer: Any) -> dict[str, Any] | None:
    """The DeepSpeed configuration as it is before anything was made from it; None under other engines."""
    return (
        copy.deepcopy(trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config) if trainer.is_deepspeed_enabled else None
    )


def forget_preparation(trainer: Any, settings: dict[str, Any] | None) -> None:
    """Let the Trainer prepare its model anew. Called on all ranks when training begins, after the old engine was let go.

    settings: from `engine_settings`.
    """
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped, trainer.deepspeed = trainer.model, None
        trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config = copy.deepcopy(settings)
        return
    if not trainer.is_fsdp_enabled and trainer.accelerator.unwrap_model(trainer.model_wrapped) is not trainer.model:
        trainer.model_wrapped = trainer.model  # trainer.model was set to another one since
    if trainer.model_wrapped is trainer.model and not trainer.is_fsdp_enabled and hasattr(trainer.model, _PREPARED):
        # Autocast was put around its forward, and would be a second time.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        delattr(trainer.model, _PREPARED)


def refuse_evaluation_first(trainer: Any) -> None:
    """An evaluation outside of training begins: under some engines only training makes what it runs on. No communication.

    Raises:
        UnsupportedError: FSDP2, DeepSpeed below stage 3, before `train()`.
    """
    if trainer.is_in_train or trainer.losia is not None:
        return
    settings = trainer.accelerator.state.deepspeed_plugin.hf_ds_config if trainer.is_deepspeed_enabled else None
    if trainer.is_fsdp_enabled or (settings is not None and not settings.is_zero3()):
        engine = "FSDP2" if settings is None else "DeepSpeed below ZeRO-3"
        raise UnsupportedError(
            f"evaluate() or predict() before train() under {engine}: the model is not wrapped yet, and Accelerate wraps it "
            "together with its optimizer only. Set eval_on_start=True, or evaluate after train()."
        )


def refuse_unwrapped(trainer: Any) -> None:
    """Training on several ranks begins: something must reduce their gradients. Same on every rank; no communication.

    Raises:
        UnsupportedError: the model is not wrapped.
    """
    if trainer.args.world_size > 1 and trainer.model_wrapped is trainer.model and not trainer.is_fsdp_enabled:
        raise UnsupportedError(
            f"the model is not wrapped for training on {trainer.args.world_size} ranks: no gradient would be reduced, and "
            "every rank would train a model of its own: something has marked it as prepared before (accelerator.prepare_model, "
            "another trainer over the same model). Give the trainer a model that nothing else has prepared."
        )
