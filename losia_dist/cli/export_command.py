"""`losia-dist export` and `losia-dist apply`: models out of checkpoints, in one process, without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from losia_dist.errors import ConfigError


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist export`."""
    parser.add_argument(
        "checkpoint",
        help="a run's output_dir or a directory of checkpoints (the newest complete one), or one of them itself",
    )
    parser.add_argument("target", metavar="DIRECTORY", help="for the plain Transformers model; with --delta: the file to write")
    parser.add_argument("--delta", action="store_true", help="write only what differs from --base_model, as one file")
    parser.add_argument(
        "--base_model",
        metavar="DIRECTORY",
        help="the model that was fine-tuned: all but its weights is copied; --delta needs it",
    )
    parser.add_argument(
        "--onto_base",
        action="store_true",
        help="of a run over a quantized base: what training changed, added to the weights of --base_model, the original",
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="send the model to the Hugging Face hub, too")


def add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist apply`."""
    parser.add_argument("base_model", help="directory of the model that was fine-tuned")
    parser.add_argument("delta", help="file that losia-dist export --delta wrote")
    parser.add_argument("target", metavar="DIRECTORY", help="for the plain Transformers model")


def run_export(options: argparse.Namespace) -> Path:
    """Write the model directory, or the delta; returns its path. One process; one weight at a time in memory.

    Raises:
        LoSiAError: a checkpoint, base model or target that cannot be used.
    """
    from losia_dist.export.delta import save_delta
    from losia_dist.export.hub import check_repository, push_model
    from losia_dist.export.live import export_model

    target = Path(options.target)
    if options.push_to_hub and options.delta:
        raise ConfigError("--push_to_hub sends a model, and --delta writes none: leave one of them out.")
    if options.push_to_hub:
        check_repository(options.push_to_hub)
    if options.base_model is not None:
        _check_base(options.base_model)
    if options.delta:
        if options.base_model is None:
            raise ConfigError("--delta needs --base_model DIRECTORY: the model that was fine-tuned, to compare with.")
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise ConfigError(f"{target} cannot be written: --delta writes one file, into a directory that is there.")
        return _writing(target, lambda: save_delta(options.checkpoint, target, options.base_model))
    if options.onto_base and options.base_model is None:
        raise ConfigError("--onto_base needs --base_model DIRECTORY: the original of the base that was quantized.")
    _check_directory(target)
    _writing(target, lambda: export_model(options.checkpoint, target, options.base_model, onto=options.onto_base))
    if options.push_to_hub:
        print(f"pushed: {push_model(target, options.push_to_hub)}")
    return target


def run_apply(options: argparse.Namespace) -> Path:
    """Rebuild the fine-tuned model from its base and a delta; returns its directory. One process.

    Raises:
        LoSiAError: a base model, delta or target that cannot be used.
    """
    from losia_dist.export.delta import apply_delta

    target = Path(options.target)
    _check_base(options.base_model)
    _check_directory(target)
    return _writing(target, lambda: apply_delta(options.delta, options.base_model, target))


def _writing(target: Path, write: Callable[[], Path]) -> Path:
    try:
        return write()
    except OSError as error:
        raise ConfigError(f"{target} could not be written: {error}.") from error


def _check_base(base_model: str) -> None:
    if not Path(base_model).is_dir():
        raise ConfigError(f"base model {base_model} is not a directory: give the directory of the model that was fine-tuned.")


def _check_directory(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file: give a directory for the model, which is made if missing.")
