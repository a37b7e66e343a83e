"""Answers that a trained model writes, greedily and many at a time, and their score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.batches import Example


@torch.no_grad()
def write_answers(model: Any, tokenizer: Any, examples: Sequence[Example], most: int, batch: int = 32) -> list[str]:
    """Greedy answers of at most `most` tokens to the examples' prompts, in their order. The model is cast to bf16."""
    model = model.to(torch.bfloat16).eval()
    device = next(model.parameters()).device
    prompts = [example["input_ids"][: int((example["labels"] != -100).nonzero()[0])] for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        tokens, mask = _left_padded([prompts[index] for index in chosen], tokenizer.pad_token_id)
        written = model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(written[:, tokens.shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers


def _left_padded(prompts: list[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Prompts that end together, and a mask of their tokens: int64 [prompts, longest] each."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask
