"""Ranks that share each sequence under Transformers' Trainer, by Accelerate's ParallelismConfig(sp_size=...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError, UnsupportedError


def sequence_ranks(trainer: Any) -> int:
    """How many ranks compute each sequence together; 1: each its own."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    return int(getattr(parallelism, "sp_size", 1) or 1)


def prepare_sequences(trainer: Any, config: LoSiAConfig) -> None:
    """Look at a trainer whose ranks share sequences, and complete what its collator gives. No communication.

    Raises:
        ConfigError, UnsupportedError: an engine or a model that cannot; the same on every rank.
    """
    size = sequence_ranks(trainer)
    if size == 1:
        return
    if not trainer.is_deepspeed_enabled:
        raise UnsupportedError(
            f"parallelism_config sp_size={size} is DeepSpeed's Ulysses: give a DeepSpeed configuration (deepspeed=...), or "
            "take sp_size out."
        )
    if config.outlier_limit is not None:
        raise UnsupportedError(
            f"outlier_limit={config.outlier_limit} with sp_size={size}: inputs are measured in evaluation, where Accelerate "
            "gives each rank its part of a sequence alone. Leave it out."
        )
    from losia_dist.integrations.deepspeed.ulysses import check_model

    check_model(trainer.model, size)
    handler = getattr(trainer.accelerator.parallelism_config, "sp_handler", None)
    if handler is not None and handler.sp_attn_implementation is None:  # Accelerate passes it on as it is
        handler.sp_attn_implementation = trainer.model.config.get_text_config()._attn_implementation
    import deepspeed

    deepspeed.init_distributed()  # Accelerate asks for its groups before DeepSpeed has taken over a process group of gloo
    processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    pad = getattr(processor, "pad_token_id", None)
    trainer.data_collator = SequenceCollator(trainer.data_collator, size, 0 if pad is None else pad)


def in_one_piece(inputs: Any) -> Any:
    """A rank's part of a batch, as Transformers' loss takes it: on a CPU DeepSpeed cuts targets [B, L / size] as views."""
    targets = inputs.get("shift_labels") if isinstance(inputs, dict) else None
    if targets is not None:
        inputs["shift_labels"] = targets.contiguous()
    return inputs


class SequenceCollator:
    """Before Accelerate cuts batches: fills rows up, on the right, to a length that the ranks divide, and numbers positions.

    Args:
        collate: the trainer's own. size: ranks that share each sequence. pad_token_id: what rows are filled up with.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], size: int, pad_token_id: int) -> None:
        self.collate, self.size, self.pad_token_id = collate, size, pad_token_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["collate"], name)

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """The batch of the trainer's collator: `input_ids`, `labels`, `position_ids` and whatever else there is, int64 [B, L'].

        Raises:
            ConfigError: an attention_mask with zeros that are not on the right.
        """
        batch: Mapping[str, Any] = self.collate(examples)
        ids: Tensor = batch["input_ids"]
        rows, length = ids.shape
        mask = batch.get("attention_mask")
        if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
            raise ConfigError(
                f"the attention_mask has zeros that are not on the right, and {self.size} ranks share each sequence and pass "
                "no mask on: set padding_side='right'."
            )
        filled = dict(batch)
        if filled.get("position_ids") is None:
            filled["position_ids"] = torch.arange(length)[None].expand(rows, -1)
        lacking = -length % self.size
        fillers = {"input_ids": self.pad_token_id, "labels": -100}
        for name, value in filled.items() if lacking else ():
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == length:
                filled[name] = functional.pad(value, (0, lacking), value=fillers.get(name, 0))
        if lacking:
            positions = filled["position_ids"]  # a new tensor, by the padding
            positions[:, length:] = positions[:, length - 1 : length] + torch.arange(1, lacking + 1)
        return filled
