"""LoSiA fine-tuning (arXiv 2507.04487) inside the engines people already run."""

from __future__ import annotations

from typing import Any

from losia_dist._version import __version__
from losia_dist.checkpoint.export import export_model
from losia_dist.checkpoint.load import load_checkpoint
from losia_dist.checkpoint.save import save_checkpoint
from losia_dist.cli.arguments import add_config_arguments
from losia_dist.conductor import LoSiA
from losia_dist.config import LoSiAConfig
from losia_dist.integrations.build_locks import guard_builds
from losia_dist.model import get_losia_model
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.subnet.groups import losia_parameter_groups

__all__ = [
    "LoSiA",
    "LoSiAAdamW",
    "LoSiACallback",
    "LoSiAConfig",
    "LoSiATrainer",
    "LoSiATrainerMixin",
    "__version__",
    "add_config_arguments",
    "export_model",
    "get_losia_model",
    "initialize",
    "load_checkpoint",
    "losia_parameter_groups",
    "save_checkpoint",
]

guard_builds()  # here, as DeepSpeed, Accelerate or TrainingArguments may build before anything of this package is called


def initialize(**arguments: Any) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize for a LoSiA model: see `losia_dist.integrations.deepspeed.initialize`."""
    from losia_dist.integrations.deepspeed import initialize as start_engine  # DeepSpeed is an optional dependency

    return start_engine(**arguments)


def __getattr__(name: str) -> Any:
    """Names that need Transformers' Trainer and Accelerate, imported when they are asked for."""
    if name == "LoSiACallback":
        from losia_dist.integrations.callback import LoSiACallback

        return LoSiACallback
    if name in ("LoSiATrainer", "LoSiATrainerMixin"):
        from losia_dist.integrations import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
