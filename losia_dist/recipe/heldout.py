"""Held-out loss and sample answers, on every engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from losia_dist.data import count_targets
from losia_dist.recipe.engines import Engine


@torch.no_grad()
def held_out_loss(run: Engine, loader: Iterable[dict[str, Tensor]]) -> float:
    """Mean loss per target token over the whole held-out set, in nats. Called by all ranks; equal on all of them."""
    was_training = run.model.training
    run.model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=run.device)
    for batch in loader:
        totals[1] += count_targets(batch) / run.sequence_ranks
        totals[0] += run.evaluate(batch).double()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    run.model.train(was_training)
    return (totals[0] / totals[1]).item()


@torch.no_grad()
def sample_answers(run: Engine, dataset: Any, tokenizer: Any, count: int, max_tokens: int) -> list[dict[str, str]]:
    """Greedy answers to the first held-out prompts. Called by all ranks with the same data, so that shards gather."""
    was_training = run.model.training
    run.model.eval()
    answers = []
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        start = int((example["labels"] != -100).nonzero()[0])
        prompt, target = example["input_ids"][:start], example["input_ids"][start:]
        if start == 0:
            continue
        inputs = prompt.unsqueeze(0).to(run.device)
        with run.whole_sequences():
            output = run.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_tokens,
                do_sample=False,
                synced_gpus=run.is_sharded,  # a rank that ends early goes on calling the model, whose shards the others gather
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        texts = (prompt, output[0, start:].cpu(), target)
        question, answer, expected = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts)
        answers.append({"prompt": question, "answer": answer, "expected": expected})
    run.model.train(was_training)
    return answers
