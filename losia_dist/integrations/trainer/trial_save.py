"""What fails at the first save alone is tried before the first step: everything of a checkpoint but weights and state."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from losia_dist.checkpoint.stored_names import conversions_of
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.errors import ConfigError, LoSiAError
from losia_dist.export.inference import write_tokenizer
from losia_dist.export.live import write_texts
from losia_dist.ranks.agreement import Agreement
from losia_dist.subnet.packed import packed_weights


def try_to_save(model: Any, args: Any, processor: Any, agreement: Agreement, *, in_output_dir: bool) -> None:
    """Write configuration, tokenizer and arguments into a directory that is then deleted. Called on all ranks; rank 0 writes.

    Args:
        args: the training arguments.
        processor: tokenizer or processor that is saved with the model, or None.
        in_output_dir: the run saves there by itself, so that it must be writable.

    Raises:
        ConfigError: what a save would fail with, on every rank.
    """
    plain: Any = unwrap(model)

    def attempt() -> None:
        try:
            if in_output_dir:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            where = args.output_dir if in_output_dir else None
            with tempfile.TemporaryDirectory(prefix=".trial-", dir=where) as directory:
                write_texts(plain, {}, Path(directory))
                if processor is not None:
                    write_tokenizer(processor, Path(directory))
                torch.save(args, os.path.join(directory, "training_args.bin"))
        except LoSiAError:
            raise
        except Exception as error:  # a model's, a tokenizer's or an argument's own saving may fail with any
            raise ConfigError(
                f"nothing of this run could be saved, so it does not begin: {type(error).__name__}: "
                f"{' '.join(str(error).split())} Mend what is named "
                "(a setting of model.generation_config, the tokenizer, output_dir ...) and start again."
            ) from error
        if args.load_best_model_at_end and packed_weights(plain):
            raise ConfigError(
                "load_best_model_at_end=True over a quantized base: the best checkpoint holds whole weights, and codes take "
                "none. Set load_best_model_at_end=False and load the best checkpoint with from_pretrained."
            )
        if args.load_best_model_at_end and conversions_of(plain):
            raise ConfigError(
                f"{type(plain).__name__} is stored under other names than it has in memory, so that its best weights could not "
                "be put back: set load_best_model_at_end=False and load the best checkpoint with from_pretrained."
            )

    agreement.on_first(None, attempt)
