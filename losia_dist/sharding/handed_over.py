"""A DeepSpeed engine that other code made (`deepspeed.initialize`, Accelerate): its settings are looked at too."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from losia_dist.errors import UnsupportedError
from losia_dist.sharding.deepspeed_config import read_deepspeed_config, refuse_unsupported


def refuse_engine_settings(model: Any, optimizer: Any) -> None:
    """Refuse what `initialize` would have refused, of the engine that holds this model and this optimizer, if one can be found.

    Same on every rank; communicates nothing.

    Raises:
        UnsupportedError: a setting that the support matrix refuses, or ranks that do not all hold data of their own.
        ConfigError: a key that DeepSpeed passes over, near one that it reads.
    """
    engine = _engine_of(model, optimizer)
    if engine is None:
        return
    if isinstance(engine.config, dict):
        refuse_unsupported(read_deepspeed_config(engine.config))
    sequence, tensor = engine.sequence_parallel_size, engine.autotp_size()
    if sequence > 1 or tensor > 1:
        raise UnsupportedError(
            f"the DeepSpeed engine runs sequence parallelism over {sequence} and tensor parallelism over {max(tensor, 1)} "
            "ranks (mpu, mesh_param, tp_model_init or its configuration): LoSiA trains on data parallelism alone."
        )


def _engine_of(model: Any, optimizer: Any) -> DeepSpeedEngine | None:
    """The engine, which is often not handed over itself: ZeRO's optimizers keep a hook of it, those of stage 0 itself."""
    hooks = getattr(optimizer, "_grad_acc_post_hooks", [])
    candidates = [model, getattr(optimizer, "deepspeed", None), *(getattr(hook, "__self__", None) for hook in hooks)]
    return next((found for found in candidates if isinstance(found, DeepSpeedEngine)), None)
