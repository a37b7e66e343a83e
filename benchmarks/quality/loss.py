"""The loss on answer tokens, with logits only where there is something to predict; the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.quality.batches import Batch

_CHUNK = 256  # tokens whose logits exist at a time without gradients


PRECISIONS = ("bf16", "fp32")  # of the arithmetic; weights are fp32 in both


def autocast(precision: str = "bf16", device: str = "cpu") -> Any:
    """What a run computes in: bf16 autocast, or fp32 for processors on which bf16 is slow."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy over the batch's answer tokens, in nats: an fp32 scalar with gradients."""
    hidden = _hidden(model, batch)
    logits = model.get_output_embeddings()(hidden)
    return functional.cross_entropy(logits.float(), batch.targets)


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch], precision: str = "bf16") -> float:
    """Mean cross-entropy per answer token over all batches, in nats, in evaluation mode."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with autocast(precision):
        for batch in batches:
            hidden = _hidden(model, batch)
            for piece, targets in zip(hidden.split(_CHUNK), batch.targets.split(_CHUNK), strict=True):
                logits = model.get_output_embeddings()(piece).float()
                total += functional.cross_entropy(logits, targets, reduction="sum").item()
            count += len(batch.targets)
    model.train(was_training)
    return total / count


def _hidden(model: Any, batch: Batch) -> Tensor:
    """Hidden states of the tokens whose next one is learned: [answers, hidden size]."""
    states = model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1]).index_select(0, batch.places)
