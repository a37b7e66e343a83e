"""Options of the training script, checked before a model is read or a rank is spoken to."""

from __future__ import annotations

import argparse
import os

from losia_dist.cli.arguments import add_config_arguments
from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError

PRECISIONS = ("bf16", "fp32")
CHECKPOINTING = ("off", "non-reentrant", "reentrant")


def add_training_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Every option of the training script; units and defaults are in the help texts."""
    model = parser.add_argument_group("model and data")
    model.add_argument("--model", required=True, help="directory or hub name of a causal language model")
    model.add_argument("--train_file", required=True, help=".jsonl or .json file, saved data set, or hub name[:split]")
    model.add_argument("--eval_file", help="held-out data in the same forms; without it, --validation_size is split off")
    model.add_argument("--validation_size", type=_count_or_share, default=0.0, help="records (2 and more) or share held out")
    model.add_argument("--form", choices=("instruction", "chat", "text"), help="form of the records (default: detected)")
    model.add_argument("--max_length", type=int, default=1024, help="tokens per example, or per packed row")
    model.add_argument("--overlong", choices=("truncate", "drop", "error"), default="truncate", help="longer records")
    model.add_argument("--packing", action="store_true", help="fill rows of max_length with several records")
    model.add_argument("--attn_implementation", help="attention of Transformers, for example sdpa or flash_attention_2")
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model (off)")
    add_config_arguments(parser)
    train = parser.add_argument_group("training")
    train.add_argument("--output_dir", required=True, help="logs, summary.json and the trained model")
    train.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed JSON configuration; without it: plain PyTorch, or DDP")
    train.add_argument("--precision", choices=PRECISIONS, help="default: bf16 if the DeepSpeed file says so or on a GPU")
    train.add_argument("--micro_batch", type=int, default=4, help="examples per rank and forward pass")
    train.add_argument("--gradient_accumulation", type=int, default=1, help="micro-batches per optimizer step")
    train.add_argument("--epochs", type=float, default=3.0, help="passes over the data (ignored with --max_steps)")
    train.add_argument("--max_steps", type=int, help="optimizer steps")
    train.add_argument("--learning_rate", type=float, default=5e-5, help="peak learning rate")
    train.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps with rising learning rate")
    train.add_argument("--min_lr_ratio", type=float, default=0.1, help="share of the peak that the cosine ends at")
    train.add_argument("--weight_decay", type=float, default=0.0)
    train.add_argument("--max_grad_norm", type=float, default=1.0, help="global gradient norm to clip to; 0: off")
    train.add_argument("--gradient_checkpointing", choices=CHECKPOINTING, default="off")
    train.add_argument("--seed", type=int, default=0, help="of the data order and of dropout")
    report = parser.add_argument_group("reporting")
    report.add_argument("--eval_steps", type=int, default=0, help="optimizer steps between held-out losses; 0: ends only")
    report.add_argument("--logging_steps", type=int, default=10, help="optimizer steps between log lines")
    report.add_argument("--samples", type=int, default=0, help="held-out prompts answered before and after training")
    report.add_argument("--sample_tokens", type=int, default=128, help="longest such answer, in tokens")
    report.add_argument("--no_save", action="store_true", help="do not write the trained model")
    # The deepspeed launcher passes it; the environment has it too.
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)), help=argparse.SUPPRESS)
    return parser


def check(options: argparse.Namespace) -> LoSiAConfig | None:
    """Refuse what cannot work, and read the LoSiA configuration; None without --losia.

    Raises:
        ConfigError: names the option, the rule and the fix.
    """
    for name in ("micro_batch", "gradient_accumulation", "logging_steps", "sample_tokens"):
        _at_least(options, name, 1)
    for name in ("eval_steps", "samples", "seed", "weight_decay", "max_grad_norm"):
        _at_least(options, name, 0)
    if options.max_steps is not None:
        _at_least(options, "max_steps", 1)
    elif not options.epochs > 0:
        raise ConfigError(f"--epochs {options.epochs}: more than 0 is needed, or --max_steps.")
    if not options.learning_rate > 0:
        raise ConfigError(f"--learning_rate {options.learning_rate}: more than 0 is needed.")
    for name in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= getattr(options, name) <= 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: a share in [0, 1] is needed.")
    if options.losia_config and not options.losia:
        raise ConfigError("--losia_config has no effect without --losia; add --losia, or leave it out.")
    if not options.losia:
        return None
    return LoSiAConfig.from_file(options.losia_config) if options.losia_config else LoSiAConfig()


def _at_least(options: argparse.Namespace, name: str, minimum: int) -> None:
    if getattr(options, name) < minimum:
        raise ConfigError(f"--{name} {getattr(options, name)}: at least {minimum} is needed.")


def _count_or_share(text: str) -> int | float:
    return float(text) if float(text) < 1 else int(text)
