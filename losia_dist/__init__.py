"""LoSiA fine-tuning (arXiv 2507.04487) inside the engines people already run."""

from __future__ import annotations

import importlib
from typing import Any

from losia_dist._version import __version__
from losia_dist.checkpoint.load import load_checkpoint
from losia_dist.checkpoint.save import save_checkpoint
from losia_dist.checkpoint.session import wait_for_saving
from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.config.selection import Drawn, Located
from losia_dist.errors import LoSiAError
from losia_dist.export.delta import apply_delta, save_delta
from losia_dist.export.live import export_model
from losia_dist.integrations.accelerate.plain_saving import refuse_plain_saving
from losia_dist.integrations.deepspeed.initialize import initialize
from losia_dist.integrations.distributed.loading import load_distributed_model
from losia_dist.model import get_losia_model, print_trainable_parameters
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.ranks.build_locks import guard_builds
from losia_dist.recipe.config_arguments import add_config_arguments
from losia_dist.run.conductor import WHEN_MADE, LoSiA
from losia_dist.sharding.clipping import clip_grad_norm_
from losia_dist.subnet.groups import losia_parameter_groups

__all__ = [
    "Drawn",
    "LoSiA",
    "LoSiAAdamW",
    "LoSiACallback",
    "LoSiAConfig",
    "LoSiAError",
    "LoSiATrainer",
    "LoSiATrainerMixin",
    "Located",
    "__version__",
    "add_config_arguments",
    "apply_delta",
    "carry_state",
    "clip_grad_norm_",
    "export_model",
    "get_losia_model",
    "initialize",
    "load_checkpoint",
    "load_distributed_model",
    "losia_parameter_groups",
    "print_trainable_parameters",
    "save_checkpoint",
    "save_delta",
    "sequence_loss",
    "split_sequence",
    "use_chunked_loss",
    "wait_for_saving",
]

# Imported when they are asked for: they import Transformers, and some of them Accelerate, which is optional.
_WHEN_ASKED_FOR = {
    "LoSiACallback": "losia_dist.integrations.trainer.callback",
    "LoSiATrainer": "losia_dist.integrations.trainer.trainer",
    "LoSiATrainerMixin": "losia_dist.integrations.trainer.trainer",
    "carry_state": "losia_dist.integrations.accelerate.carried_state",
    "sequence_loss": "losia_dist.loss.sequence_loss",
    "split_sequence": "losia_dist.data.sequence",
    "use_chunked_loss": "losia_dist.loss.without_logits",
}

guard_builds()  # here, as DeepSpeed, Accelerate or TrainingArguments may build before anything of this package is called
WHEN_MADE.append(refuse_plain_saving)


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_WHEN_ASKED_FOR[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "accelerate":
            raise
        raise ImportError(f"losia_dist.{name} needs Accelerate: pip install 'losia_dist[trainer]'.", name=name) from error
