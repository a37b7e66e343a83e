"""LoSiA fine-tuning (arXiv 2507.04487) inside the engines people already run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from losia_dist._version import __version__
from losia_dist.ranks.when_built import guard_later
from losia_dist.run.when_made import WHEN_MADE

if TYPE_CHECKING:
    from losia_dist.checkpoint.load import load_checkpoint
    from losia_dist.checkpoint.save import save_checkpoint
    from losia_dist.checkpoint.session import wait_for_saving
    from losia_dist.config.losia_config import LoSiAConfig
    from losia_dist.config.selection import Drawn, Located
    from losia_dist.data.sequence import split_sequence
    from losia_dist.errors import LoSiAError
    from losia_dist.export.delta import apply_delta, save_delta
    from losia_dist.export.live import export_model
    from losia_dist.integrations.accelerate.carried_state import carry_state
    from losia_dist.integrations.deepspeed.initialize import initialize
    from losia_dist.integrations.distributed.loading import load_distributed_model
    from losia_dist.integrations.trainer.callback import LoSiACallback
    from losia_dist.integrations.trainer.trainer import LoSiATrainer, LoSiATrainerMixin
    from losia_dist.loss.sequence_loss import sequence_loss
    from losia_dist.loss.without_logits import use_chunked_loss
    from losia_dist.model import get_losia_model, print_trainable_parameters
    from losia_dist.optim.adamw import LoSiAAdamW
    from losia_dist.recipe.config_arguments import add_config_arguments
    from losia_dist.run.conductor import LoSiA
    from losia_dist.sharding.clipping import clip_grad_norm_
    from losia_dist.subnet.groups import losia_parameter_groups

# Imported when they are asked for: a command that needs no torch does not wait for it, and Accelerate is optional.
_PLACES = {
    "Drawn": "config.selection",
    "LoSiA": "run.conductor",
    "LoSiAAdamW": "optim.adamw",
    "LoSiACallback": "integrations.trainer.callback",
    "LoSiAConfig": "config.losia_config",
    "LoSiAError": "errors",
    "LoSiATrainer": "integrations.trainer.trainer",
    "LoSiATrainerMixin": "integrations.trainer.trainer",
    "Located": "config.selection",
    "add_config_arguments": "recipe.config_arguments",
    "apply_delta": "export.delta",
    "carry_state": "integrations.accelerate.carried_state",
    "clip_grad_norm_": "sharding.clipping",
    "export_model": "export.live",
    "get_losia_model": "model",
    "initialize": "integrations.deepspeed.initialize",
    "load_checkpoint": "checkpoint.load",
    "load_distributed_model": "integrations.distributed.loading",
    "losia_parameter_groups": "subnet.groups",
    "print_trainable_parameters": "model",
    "save_checkpoint": "checkpoint.save",
    "save_delta": "export.delta",
    "sequence_loss": "loss.sequence_loss",
    "split_sequence": "data.sequence",
    "use_chunked_loss": "loss.without_logits",
    "wait_for_saving": "checkpoint.session",
}
_ROOMS = ("config", "errors", "loss")  # that hold public names too

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


def _refuse_plain_saving() -> None:
    from losia_dist.integrations.accelerate.plain_saving import refuse_plain_saving

    refuse_plain_saving()


guard_later()
WHEN_MADE.append(_refuse_plain_saving)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"losia_dist.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(f"losia_dist.{_PLACES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "accelerate":
            raise
        raise ImportError(f"losia_dist.{name} needs Accelerate: pip install 'losia_dist[trainer]'.", name=name) from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
