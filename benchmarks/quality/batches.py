"""Examples to batches that waste little: sorted by length, without a mask, and with the loss's places known beforehand.

Padding is on the right and attention is causal, so that no real token ever sees padding: no mask is needed, and the
attention kernel that reads none is the fastest. Dimensions in names: b examples, t tokens of the longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losia_dist.data import Records, build_dataset

TRAINED, HELD_OUT = 256, 640  # tokens of the longest problem that is trained on, and of the longest that is evaluated
_WINDOW = 16  # batches that are sorted by length together: little padding, and an order that is still random


@dataclass
class Batch:
    """tokens: int64 [b, t], padded on the right. places: int64, positions in [b * t] whose next token is learned.

    targets: int64, those next tokens.
    """

    tokens: Tensor
    places: Tensor
    targets: Tensor


Example = dict[str, Tensor]


def encode(records: Records, tokenizer: Any, max_length: int) -> list[Example]:
    """Records as `losia_dist.data` encodes them, with loss on the answers; those that are too long are left out."""
    dataset = build_dataset(records, tokenizer, max_length, overlong="drop")
    return [dataset[index] for index in range(len(dataset))]


def encode_text(texts: list[str], tokenizer: Any, max_length: int = 256) -> list[Example]:
    """Plain texts, every token learned, at most `max_length` tokens of each."""
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:max_length]) for text in texts]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


def collate(examples: list[Example]) -> Batch:
    """One batch of these examples."""
    tokens = pad_sequence([example["input_ids"] for example in examples], batch_first=True, padding_value=0)
    labels = pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=-100)
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    places = (following != -100).nonzero().squeeze(1)
    return Batch(tokens, places, following[places])


def training_batches(examples: list[Example], size: int, steps: int, seed: int) -> list[Batch]:
    """`steps` batches of `size` examples. The order depends on the seed alone, never on the method.

    An epoch is one random order of all examples; the next begins where it ends.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(examples), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, steps * size, _WINDOW * size):
        window = order[start : min(start + _WINDOW * size, steps * size)]
        window.sort(key=lambda index: len(examples[index]["input_ids"]))
        cut = [window[at : at + size] for at in range(0, len(window), size)]
        batches += [cut[place] for place in torch.randperm(len(cut), generator=generator).tolist()]
    return [collate([examples[index] for index in batch]) for batch in batches]


def evaluation_batches(examples: list[Example], tokens: int = 4096) -> list[Batch]:
    """All examples, sorted by length, in batches of at most about `tokens` tokens."""
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    batches: list[list[Example]] = [[]]
    for example in ordered:
        if batches[-1] and (len(batches[-1]) + 1) * len(example["input_ids"]) > tokens:
            batches.append([])
        batches[-1].append(example)
    return [collate(batch) for batch in batches]
