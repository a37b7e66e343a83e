"""Batches: collators, and loaders that give every rank the same number of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from losia_dist.data.dataset import IGNORED, TokenizedDataset, _pad_id
from losia_dist.data.packing import PackedDataset
from losia_dist.errors import ConfigError, DataError

Batch = dict[str, Tensor]


class PaddingCollator:
    """Pads to the longest example of the batch, on the right.

    Takes examples with `input_ids` and `labels` [length]; returns `input_ids`, `attention_mask` and `labels`, int64
    [batch, length]. Padding is told by position alone: `attention_mask` 0 and label -100. An example's own tokens keep
    mask and label where they equal `pad_token_id`, so that with pad = eos the model still learns to stop.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Tensor]]) -> Batch:
        ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        columns = {
            "input_ids": (ids, self.pad_token_id),
            "attention_mask": ([torch.ones_like(one) for one in ids], 0),
            "labels": (labels, IGNORED),
        }
        return {name: pad_sequence(parts, batch_first=True, padding_value=value) for name, (parts, value) in columns.items()}


class PackedCollator:
    """Batches of packed rows: `input_ids`, `labels`, `position_ids`, and no attention mask (see `packing`).

    flatten: lay the rows end to end, int64 [1, batch * max_length], which keeps records apart with every attention, and
    which flash attention needs; else [batch, max_length], for which sdpa and eager need less time and memory.
    """

    def __init__(self, flatten: bool = True) -> None:
        self.flatten = flatten

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> Batch:
        join = (lambda parts: torch.cat(parts)[None]) if self.flatten else torch.stack
        return {key: join([row[key] for row in rows]) for key in ("input_ids", "labels", "position_ids")}


def make_loader(
    dataset: TokenizedDataset | PackedDataset,
    tokenizer: Any,
    micro_batch: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    flatten: bool = True,
) -> DataLoader[Batch]:
    """A training loader: this rank's batches of `micro_batch` examples, as many on every rank.

    The order depends on `seed` and the epoch alone; call `loader.sampler.set_epoch(epoch)` before each epoch. At step k
    the ranks together see the same examples whatever their number, as long as world_size * micro_batch is the same.

    What does not fill a batch on every rank is left out. `flatten` is for packed rows: see `PackedCollator`.

    Raises: DataError when this leaves no batch; ConfigError for a setting that cannot work.
    """
    _check(micro_batch, rank, world_size)
    if len(dataset) < micro_batch * world_size:
        raise DataError(
            f"{len(dataset)} examples do not fill one batch on every rank: micro_batch={micro_batch} on {world_size} "
            f"ranks needs {micro_batch * world_size}. Give more data, or a smaller micro_batch."
        )
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world_size, rank, seed=seed, drop_last=True)
    return _loader(dataset, micro_batch, sampler, _collator(dataset, tokenizer, flatten), seed, drop_last=True)


def make_evaluation_loader(
    dataset: TokenizedDataset | PackedDataset,
    tokenizer: Any,
    micro_batch: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    flatten: bool = True,
) -> DataLoader[Batch]:
    """A loader for held-out loss: each example once over all ranks, in order, and as many batches on every rank.

    Ranks that would have fewer examples get blanks, whose labels are all -100. A mean over batches would weigh them,
    and a batch of nothing but blanks has no mean (0 / 0): add up losses and targets, and divide once, over all ranks:

        loss_sum += model(**batch, num_items_in_batch=1).loss      # Transformers: the sum over targets
        targets += count_targets(batch)

    Raises: ConfigError for a setting that cannot work.
    """
    _check(micro_batch, rank, world_size)
    filled = _WithBlanks(dataset, -len(dataset) % world_size)
    sampler: DistributedSampler[Any] = DistributedSampler(filled, num_replicas=world_size, rank=rank, shuffle=False)
    return _loader(filled, micro_batch, sampler, _collator(dataset, tokenizer, flatten))


def count_targets(batch: Mapping[str, Tensor]) -> int:
    """The number of tokens over which a batch's loss is summed. The first label of a row has nothing to predict it.

    batch: "labels" int64 [B, L]; waits for its device.
    """
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class _WithBlanks(Dataset[dict[str, Tensor]]):
    """`dataset`, then `blanks` copies of its shortest example without loss: the cheapest that any model takes."""

    def __init__(self, dataset: TokenizedDataset | PackedDataset, blanks: int) -> None:
        self.dataset = dataset
        self.blanks = blanks
        self.shortest = min(range(len(dataset)), key=dataset.length) if blanks else 0

    def __len__(self) -> int:
        return len(self.dataset) + self.blanks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.dataset):
            return self.dataset[index]
        example = dict(self.dataset[self.shortest])
        example["labels"] = torch.full_like(example["labels"], IGNORED)
        return example


def _loader(
    dataset: Dataset[Any], micro_batch: int, sampler: Any, collate: Any, seed: int = 0, drop_last: bool = False
) -> DataLoader[Batch]:
    # A generator of its own: a loader otherwise draws from the global one, and so changes the model's dropout.
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, micro_batch, sampler=sampler, collate_fn=collate, drop_last=drop_last, generator=generator)


def _collator(dataset: TokenizedDataset | PackedDataset, tokenizer: Any, flatten: bool) -> PaddingCollator | PackedCollator:
    return PackedCollator(flatten) if isinstance(dataset, PackedDataset) else PaddingCollator(_pad_id(tokenizer))


def _check(micro_batch: int, rank: int, world_size: int) -> None:
    if micro_batch < 1:
        raise ConfigError(f"micro_batch={micro_batch}: give a number of examples, at least 1.")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} with world_size={world_size}: ranks run from 0 to world_size - 1.")
