"""A DeepSpeed engine that other code made (`deepspeed.initialize`, Accelerate): its settings are looked at too."""

from __future__ import annotations

import weakref
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from losia_dist.errors import UnsupportedError
from losia_dist.sharding.deepspeed_config import read_deepspeed_config, refuse_unsupported

_NOTED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DeepSpeedEngine]] = weakref.WeakKeyDictionary()


def refuse_engine_settings(model: Any, optimizer: Any) -> None:
    """Refuse what `initialize` would have refused, of the engine that holds this model and this optimizer, if one can be found.

    Same on every rank; communicates nothing.

    Raises:
        UnsupportedError: a setting that the support matrix refuses, or ranks that do not all hold data of their own.
        ConfigError: a key that DeepSpeed passes over, near one that it reads.
    """
    engine = engine_of(model, optimizer)
    if engine is None:
        return
    if isinstance(engine.config, dict):
        refuse_unsupported(read_deepspeed_config(engine.config))
        asked = engine.config.get("sequence_parallel_size", 1)
        if asked not in (1, engine.sequence_parallel_size):
            raise UnsupportedError(
                f'"sequence_parallel_size": {asked} in the DeepSpeed configuration, but the engine runs sequence parallelism '
                "over "
                f"{engine.sequence_parallel_size} ranks: DeepSpeed reads it together with mpu alone. Use losia_dist.initialize."
            )
    tensor = max(engine.autotp_size(), 1)
    if tensor > 1 or engine.mesh_device is not None:
        raise UnsupportedError(
            f"the DeepSpeed engine runs tensor parallelism over {tensor} ranks or on a mesh of its own (mesh_param, "
            "tp_model_init, data_parallel_size or its configuration): LoSiA trains on data parallelism, and on sequence "
            "parallelism by sequence_parallel_size or mpu."
        )


def note_engine(engine: DeepSpeedEngine) -> None:
    """Let `engine_of` find an engine by the plain model in it: at stage 0 no optimizer leads to it."""
    _NOTED[engine.module] = weakref.ref(engine)


def engine_of(model: Any, optimizer: Any) -> DeepSpeedEngine | None:
    """The engine, which is often not handed over itself: ZeRO's optimizers keep a hook of it, those of stage 0 itself."""
    hooks = getattr(optimizer, "_grad_acc_post_hooks", [])
    noted = _NOTED.get(model, lambda: None)()
    candidates = [model, noted, getattr(optimizer, "deepspeed", None), *(getattr(hook, "__self__", None) for hook in hooks)]
    return next((found for found in candidates if isinstance(found, DeepSpeedEngine)), None)
