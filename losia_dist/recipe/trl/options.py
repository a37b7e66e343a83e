"""Options of `losia-dist dpo`, `kto`, `reward` and `grpo`: a few of this package, and every one of TRL's configuration."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from losia_dist.errors import ConfigError
from losia_dist.recipe.trl.kinds import KINDS, classes_of


def add_trl_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add them to a parser. Raises: ConfigError where TRL is missing."""
    import torch
    from transformers import HfArgumentParser

    own = parser.add_argument_group("LoSiA, model and data")
    own.add_argument("--model", required=True, help="directory or hub name of a model")
    is_rl = kind == "grpo"
    own.add_argument(
        "--train_file",
        nargs="+",
        metavar="SOURCE",
        required=not is_rl,
        help=f"as for losia-dist train; each record has {KINDS[kind].about}",
    )
    own.add_argument("--eval_file", nargs="+", metavar="SOURCE", help="held-out data in the same forms")
    own.add_argument("--losia_config", metavar="NAME|FILE", help="as for losia-dist train (the published settings)")
    if is_rl:
        own.add_argument("--reward", metavar="MODULE:FUNCTION", help="reward, as TRL calls it; with --train_file")
        own.add_argument("--task", metavar="NAME", help="a task of reasoning-gym, with its own reward, instead of both")
        own.add_argument("--task_settings", metavar="JSON", help='of that task: {"min_terms": 2, "max_terms": 3}')
        own.add_argument("--task_size", type=int, default=2000, help="problems of that task (2000)")
    settings = HfArgumentParser(classes_of(kind)[1], add_help=False)
    # TRL asks for bf16 units of a GPU, and Transformers for a GPU.
    settings.set_defaults(bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available())
    known = {name for action in parser._actions for name in action.option_strings}
    for action in settings._actions:
        if not known & set(action.option_strings):
            parser._add_action(action)
    parser.set_defaults(bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available())


def read_config(kind: str, options: argparse.Namespace) -> Any:
    """TRL's configuration from the options. Raises: ConfigError, with what TRL says of them."""
    config = classes_of(kind)[1]
    if options.output_dir is None:
        raise ConfigError("--output_dir is needed: for the logs and the trained model.")
    try:
        return config(**{one.name: getattr(options, one.name) for one in fields(config) if one.init})
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"losia-dist {kind}: {error}") from error
