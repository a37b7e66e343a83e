"""Options of the training script, checked before a model is read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from datetime import date
from typing import Any

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.data.dataset import OVERLONG
from losia_dist.data.forms import FORMS
from losia_dist.errors import ConfigError
from losia_dist.recipe.config_arguments import add_config_arguments
from losia_dist.recipe.trackers import TRACKERS, check_trackers

PRECISIONS = ("bf16", "fp32")
QUANTIZATIONS = ("nf4", "fp4", "int8", "fp8")
EXPORTS = ("trained", "onto", "better")
CHECKPOINTING = ("off", "non-reentrant", "reentrant", "offloaded")
_COUNTS = "micro_batch gradient_accumulation logging_steps sample_tokens max_steps loss_chunk data_workers keep_last"
_MAY_BE_0 = "eval_steps samples seed weight_decay max_grad_norm save_steps"
_LEAST = {"sequence_parallel": 1, "tiled_mlp": 1, **dict.fromkeys(_COUNTS.split(), 1), **dict.fromkeys(_MAY_BE_0.split(), 0)}


def add_training_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Every option of the training script; units and defaults are in the help texts."""
    model = parser.add_argument_group("model and data")
    model.add_argument("--model", required=True, help="directory or hub name of a causal language model")
    model.add_argument(
        "--train_file",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="files (.jsonl, .json, .parquet, .csv, .tsv, .txt; also .gz, .zst), directories, globs, saved data sets, hub "
        "names[:split]; each with [start:stop] for a part, and with :WEIGHT for its share of a mix",
    )
    model.add_argument(
        "--eval_file",
        nargs="+",
        metavar="SOURCE",
        help="held-out data in the same forms; without it, --validation_size is split off",
    )
    model.add_argument(
        "--validation_size", type=_count_or_share, default=0.0, help="held-out records (1 and more) or their share (0.05)"
    )
    add_record_arguments(model)
    model.add_argument(
        "--data_cache",
        metavar="DIRECTORY|off",
        help="where tokenized data is kept, to be found again at the next start; off: in each rank's memory "
        "($LOSIA_DATA_CACHE, or ~/.cache/losia_dist/data)",
    )
    model.add_argument(
        "--data_workers", type=int, default=1, metavar="N", help="processes of each rank that tokenize (1: its own)"
    )
    model.add_argument(
        "--streaming",
        action="store_true",
        help="read --train_file from front to back and keep its tokens alone, for what is larger than the disk (off)",
    )
    model.add_argument("--packing", action="store_true", help="fill rows of max_length with several records")
    model.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="with --losia: keep the frozen weights in 4 or 8 bits (bitsandbytes' nf4, fp4, int8; fp8 on a GPU)",
    )
    model.add_argument("--attn_implementation", help="attention of Transformers, for example sdpa or flash_attention_2")
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model (off)")
    add_config_arguments(parser)
    engine = parser.add_argument_group("engine (default: one process, or DDP over all ranks; accelerate launch sets it too)")
    engine.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed JSON configuration")
    engine.add_argument(
        "--sharding",
        help="FSDP2: fsdp2, fsdp2-no-reshard (weights stay whole until backward), or hsdp:N (N ranks share one copy)",
    )
    engine.add_argument("--offload", action="store_true", help="with --sharding: keep shards and their state on the CPU")
    engine.add_argument(
        "--shard_layers",
        nargs="+",
        metavar="CLASS",
        help="with --sharding: classes of the modules that are gathered one by one (default: decoder layers)",
    )
    engine.add_argument(
        "--sequence_parallel",
        type=int,
        default=1,
        metavar="N",
        help="with --losia and --deepspeed: N neighbouring ranks compute each sequence together, for long ones (1)",
    )
    engine.add_argument(
        "--tiled_mlp",
        type=int,
        default=1,
        metavar="N",
        help="with --losia and --deepspeed: MLPs compute a micro-batch in N parts, again in backward, for long sequences (1)",
    )
    engine.add_argument("--precision", choices=PRECISIONS, help="default: bf16 if the DeepSpeed file says so or on a GPU")
    engine.add_argument(
        "--gradient_checkpointing",
        choices=CHECKPOINTING,
        help="recompute activations in backward; offloaded: what that begins from waits in host memory (off)",
    )
    engine.add_argument(
        "--timeout", type=float, default=30.0, metavar="MINUTES", help="that a rank waits for the others before it stops (30)"
    )
    train = parser.add_argument_group("training")
    train.add_argument("--output_dir", required=True, help="for logs, summary.json and the trained model")
    train.add_argument(
        "--overwrite",
        action="store_true",
        help="delete what an earlier run of this script wrote into output_dir, just before training begins; without it and "
        "without --resume, such a directory is refused",
    )
    train.add_argument("--micro_batch", type=int, default=4, help="examples per rank and forward pass (4)")
    train.add_argument("--gradient_accumulation", type=int, default=1, help="micro-batches per optimizer step (1)")
    train.add_argument("--epochs", type=float, default=3.0, help="passes over the data, if --max_steps is not given (3)")
    train.add_argument("--max_steps", type=int, help="optimizer steps; overrides --epochs")
    train.add_argument("--learning_rate", type=float, help="peak learning rate (2e-3 for the preset short, else 5e-5)")
    train.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps with rising learning rate (0.1)")
    train.add_argument("--min_lr_ratio", type=float, default=0.1, help="share of the peak that the cosine ends at (0.1)")
    train.add_argument("--weight_decay", type=float, default=0.0, help="decoupled, of what trains (0)")
    train.add_argument("--max_grad_norm", type=float, default=1.0, help="global gradient norm to clip to; 0: off (1.0)")
    train.add_argument(
        "--loss",
        type=_loss,
        choices=("plain", "chunked"),
        default="plain",
        help="plain: the model's own; chunked, for large vocabularies: some tokens at a time, so that all logits never exist "
        "at once, computed again in backward (plain)",
    )
    train.add_argument(
        "--loss_chunk", type=int, metavar="TOKENS", help="with --loss chunked: tokens at a time (as many as give 2**26 logits)"
    )
    train.add_argument("--seed", type=int, default=0, help="of the data order and of dropout (0)")
    saving = parser.add_argument_group("checkpoints (in output_dir/checkpoints; with --losia)")
    saving.add_argument(
        "--save_steps",
        type=int,
        default=0,
        help="optimizer steps between checkpoints; also at the end and at SIGTERM; 0: off (0)",
    )
    saving.add_argument("--keep_last", type=int, metavar="K", help="delete all but the newest K checkpoints (all are kept)")
    saving.add_argument("--async_save", action="store_true", help="write checkpoints in the background")
    saving.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        default="never",
        metavar="auto|never|DIRECTORY",
        help="go on from the newest checkpoint in output_dir, or from that of DIRECTORY (a run's, or one step's); auto: start "
        "anew where there is none, for jobs that are queued again with the same command (never)",
    )
    report = parser.add_argument_group("reporting")
    report.add_argument(
        "--eval_steps", type=int, default=0, help="optimizer steps between held-out losses; 0: at start and end only (0)"
    )
    report.add_argument("--logging_steps", type=int, default=10, help="optimizer steps between log lines (10)")
    report.add_argument("--samples", type=int, default=0, help="held-out prompts answered before and after training (0)")
    report.add_argument("--sample_tokens", type=int, default=128, help="longest such answer, in tokens (128)")
    report.add_argument(
        "--report_to",
        nargs="+",
        choices=[*TRACKERS, "none"],
        default=["tensorboard"],
        help="where numbers go besides metrics.jsonl; several are possible (tensorboard)",
    )
    report.add_argument(
        "--export",
        choices=EXPORTS,
        default="trained",
        help="with --quantization, the model that is written: trained: the codes' values with what training changed; onto: the "
        "original's weights with it; better: the one of lower held-out loss (trained)",
    )
    report.add_argument("--no_save", action="store_true", help="do not write the trained model")
    report.add_argument(
        "--push_to_hub", metavar="OWNER/NAME", help="send the trained model to the Hugging Face hub, into a private repository"
    )
    # The deepspeed launcher passes it; the environment has it too.
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)), help=argparse.SUPPRESS)
    return parser


def add_record_arguments(parser: Any) -> None:
    """How records become tokens: of `losia-dist train` and `losia-dist data`."""
    parser.add_argument("--form", choices=FORMS, help="form of the records (default: detected)")
    parser.add_argument(
        "--columns", nargs="+", metavar="NAME=KEY", help="other names of a form's keys: question=instruction answer=output"
    )
    parser.add_argument(
        "--chat_template",
        metavar="FILE|trl",
        help="Jinja file in place of the tokenizer's template, saved with the model; trl: TRL's training template for the "
        "tokenizer's, for training alone",
    )
    parser.add_argument(
        "--template_date",
        metavar="YYYY-MM-DD",
        type=_day,
        help="what a chat template that writes the date takes for today (the day of the first start, kept when it is resumed)",
    )
    parser.add_argument("--max_length", type=int, default=1024, help="tokens per example, or per packed row (1024)")
    parser.add_argument("--overlong", choices=OVERLONG, default="truncate", help="what to do with longer records (truncate)")


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give a day as YYYY-MM-DD") from None


def _loss(name: str) -> str:
    if name == "liger":
        raise argparse.ArgumentTypeError(
            "liger was removed, since no GPU ever measured a gain (CHANGELOG.md): use chunked, which keeps the logits small too"
        )
    return name


def check(options: argparse.Namespace) -> LoSiAConfig | None:
    """Refuse what cannot work, and read the LoSiA configuration; None without --losia, or where --losia stands alone.

    Raises:
        ConfigError: names the option, the rule and the fix.
    """
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and not value >= least:  # so that "nan" is refused too
            raise ConfigError(f"--{name} {value}: at least {least} is needed.")
    for name in ("learning_rate", "timeout", *([] if options.max_steps else ["epochs"])):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value}: a number above 0 is needed.")
    for name in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= getattr(options, name) <= 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: a share in [0, 1] is needed.")
    parse_columns(options.columns)
    check_trackers(options.report_to)
    for broken, text in _rules(options):
        if broken:
            raise ConfigError(text)
    return LoSiAConfig.read(options.losia_config) if options.losia_config else None


def parse_columns(given: list[str] | None) -> dict[str, str] | None:
    """--columns as {name in the file: name of a form}. Raises: ConfigError."""
    columns = dict(pair.split("=", 1) for pair in given or [] if "=" in pair)
    if len(columns) != len(given or []) or not all(columns) or not all(columns.values()):
        raise ConfigError(
            f"--columns {' '.join(given or [])}: give the file's names and the form's: question=instruction answer=output."
        )
    return columns or None


def _rules(o: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """Options that do not go together: whether they are given so, and what is said then."""
    yield o.losia_config and not o.losia, "--losia_config has no effect without --losia; add --losia, or leave it out."
    text = f"--quantization {o.quantization} works with --losia only: codes cannot train in full. Add --losia, or leave it out."
    yield o.quantization and not o.losia, text
    text = f"--export {o.export} is for a base that --quantization makes: add it, or leave --export out."
    yield o.export != "trained" and not o.quantization, text
    text = "--export better compares held-out losses: give --eval_file or --validation_size."
    yield o.export == "better" and not (o.eval_file or o.validation_size), text
    yield o.push_to_hub and o.no_save, "--push_to_hub sends the trained model, which --no_save leaves out: give one of them."
    text = "--loss_chunk has no effect without --loss chunked; add it, or leave --loss_chunk out."
    yield o.loss_chunk is not None and o.loss != "chunked", text
    uncached = o.data_cache == "off"
    text = f"--data_workers {o.data_workers} fill the data cache: leave out --data_cache off, or them."
    yield o.data_workers > 1 and uncached, text
    yield (
        o.streaming and uncached,
        "--streaming keeps the tokens in the data cache: leave out --data_cache off, or --streaming.",
    )
    text = f"--validation_size {o.validation_size} needs the number of records, which a stream does not know: "
    yield o.streaming and o.validation_size, f"{text}give held-out data by --eval_file, or leave out --streaming."
    for name in ("eval_steps", "samples"):
        text = f"--{name} {getattr(o, name)} needs held-out data: give --eval_file or --validation_size."
        yield getattr(o, name) and not (o.eval_file or o.validation_size), text
    text = "--eval_file and --validation_size both name held-out data: give one of the two."
    yield o.eval_file and o.validation_size, text
    text = "--samples does not work with --packing, whose rows hold several prompts; leave one of them out."
    yield o.samples and o.packing, text
    yield o.deepspeed and o.sharding, "--deepspeed and --sharding are two engines: give one of them."
    for name in ("offload", "shard_layers"):
        text = f"--{name} belongs to --sharding; with DeepSpeed, offloading stands in its own file."
        yield getattr(o, name) and not o.sharding, text
    together = o.sequence_parallel > 1
    text = f"--sequence_parallel {o.sequence_parallel} works with --losia only: add it, or leave --sequence_parallel out."
    yield together and not o.losia, text
    text = f"--sequence_parallel {o.sequence_parallel} is DeepSpeed's: give --deepspeed, and not --sharding."
    yield together and o.sharding, text
    text = f"--max_length {o.max_length} is not divided by --sequence_parallel {o.sequence_parallel}, which cuts packed rows."
    yield together and o.packing and o.max_length % o.sequence_parallel, text
    text = f"--tiled_mlp {o.tiled_mlp} works with --losia only: add it, or leave --tiled_mlp out."
    yield o.tiled_mlp > 1 and not o.losia, text
    given = {"--keep_last": o.keep_last is not None, "--async_save": o.async_save, "--resume auto": o.resume == "auto"}
    for name, there in given.items():
        yield there and not o.save_steps, f"{name} has no effect without --save_steps: add it, or leave {name} out."
    text = "--overwrite deletes the run that --resume goes on from: leave one of the two out."
    yield o.overwrite and o.resume in ("auto", "newest"), text
    text = (
        "--overwrite: torchrun has started this run again, and it would delete what it wrote before. To go on from its "
        "checkpoints: --save_steps with --resume auto, without --overwrite."
    )
    yield o.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", text
    name = "--save_steps" if o.save_steps else "--resume"
    text = f"{name} works with --losia only: checkpoints hold subnets and their state. Add --losia, or leave {name} out."
    yield not o.losia and (o.save_steps or o.resume != "never"), text


def _count_or_share(text: str) -> int | float:
    try:
        return float(text) if float(text) < 1 else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of records nor a share below 1") from None
