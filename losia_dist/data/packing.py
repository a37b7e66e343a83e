"""Packing: several records in one row of exactly `max_length` tokens, none of which attends to another record.

How the records stay apart: a packed batch has no `attention_mask`; its `position_ids` restart at 0 for each record.
From these Transformers finds the records itself: `masking_utils.find_packed_sequence_indices` for sdpa, eager and flex
attention, `modeling_flash_attention_utils._is_packed_sequence` for flash attention (`DataCollatorWithFlattening` relies
on the same). Both look only under a condition, and otherwise attend across records without a word;
`prepare_for_packing` sees to them:
- sdpa, eager, flex: no key-value cache. It is on by default, in training too (`config.use_cache`).
- flash: one row per batch; the collator lays a batch's rows end to end.
"""

from __future__ import annotations

import inspect
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from losia_dist.data.dataset import IGNORED, Report, TokenizedDataset
from losia_dist.errors import DataError

_MASKED = ("sdpa", "eager", "flex_attention")


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of packed examples: `input_ids`, `labels`, `position_ids`, int64 [max_length] each.

    `position_ids` restart at 0 for each record; a record's first label is -100. What is left of a row is padding, which
    counts as one more record, without loss.
    """

    def __init__(self, examples: TokenizedDataset, max_length: int, pad_token_id: int) -> None:
        self.examples = examples
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.rows = best_fit([examples.length(index) for index in range(len(examples))], max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        members = [self.examples[example] for example in self.rows[index]]
        padding = self.max_length - sum(len(member["input_ids"]) for member in members)
        members.append({"input_ids": torch.full((padding,), self.pad_token_id), "labels": torch.full((padding,), IGNORED)})
        return {
            "input_ids": torch.cat([member["input_ids"] for member in members]),
            "labels": torch.cat([member["labels"] for member in members]),
            "position_ids": torch.cat([torch.arange(len(member["input_ids"])) for member in members]),
        }

    def length(self, index: int) -> int:
        """Tokens of a row: always `max_length`."""
        return self.max_length

    def fingerprint(self) -> str:
        """A hash of the examples, to compare between ranks; their rows follow from them."""
        return self.examples.fingerprint()

    def report(self) -> Report:
        return replace(self.examples.report(), rows=len(self), row_tokens=len(self) * self.max_length)


def best_fit(lengths: Sequence[int], capacity: int) -> list[array[int]]:
    """Distribute items over rows of `capacity`, longest first, each into the fullest row that still takes it.

    Returns the item indices of each row. Deterministic; O(n log n + n log capacity) for n items.
    """
    rows: list[array[int]] = []
    open_rows: dict[int, list[int]] = {}  # free space -> rows with just that much
    spaces: list[int] = []  # the keys of open_rows, sorted
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        at = bisect_left(spaces, lengths[item])
        if at < len(spaces):
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        else:
            space, row = capacity, len(rows)
            rows.append(array("q"))
        rows[row].append(item)
        space -= lengths[item]
        if space not in open_rows:
            open_rows[space] = []
            insort(spaces, space)
        open_rows[space].append(row)
    return rows


def prepare_for_packing(model: Any) -> bool:
    """Make `model`, a Transformers model that no engine has wrapped yet, keep packed records apart, or refuse it.

    Sets `model.config.use_cache` to False, as Transformers' Trainer does: with a cache, sdpa and eager attention do not
    look for packed records. Generation has a setting of its own.

    Some models take position_ids and do not look for records (OPT, Falcon with ALiBi). So two records of four tokens
    are run: a changed first one must leave the second's logits as they are. This is left out where it cannot run yet:
    weights on the meta device or partitioned by `deepspeed.zero.Init`, flash or flex attention on the CPU.

    Returns whether a batch's rows must be laid end to end, the `flatten` of `make_loader`: True for flash attention.

    Raises: DataError when the model's attention cannot keep records apart.
    """
    fix = "Turn packing off, or load the model with attn_implementation='sdpa'."
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise DataError(f"{name} takes no position_ids, so that packed records would see each other. Turn packing off.")
    config = model.config.get_text_config()
    recurrent = sorted(
        {kind for kind in getattr(config, "layer_types", None) or [] if "attention" not in kind or "linear" in kind}
    )
    if recurrent:
        raise DataError(
            f"{name} has layers that carry state from one record to the next ({', '.join(recurrent)}). Turn packing off."
        )
    implementation = config._attn_implementation
    flash = "flash" in implementation
    if not flash and implementation not in _MASKED:
        raise DataError(f"{name} uses the attention '{implementation}', which is not known to keep records apart. {fix}")
    model.config.use_cache = config.use_cache = False
    # flash and flex attention need kernels that the CPU lacks, and the model may not have been moved yet.
    parameters = list(model.parameters())
    runs_here = implementation in ("sdpa", "eager") or parameters[0].device.type != "cpu"
    whole = all(parameter.numel() > 0 and not parameter.is_meta for parameter in parameters)
    if runs_here and whole and _records_see_each_other(model):
        raise DataError(f"{name} lets packed records see each other: it does not tell them apart. Turn packing off.")
    return flash


@torch.no_grad()
def _records_see_each_other(model: Any) -> bool:
    embedding = model.get_input_embeddings()
    position_ids = torch.arange(4, device=embedding.weight.device).repeat(2)[None]
    input_ids = torch.arange(1, 9, device=embedding.weight.device)[None] % embedding.num_embeddings
    changed = torch.cat([input_ids[:, 4:], input_ids[:, 4:]], dim=1)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        one, other = (model(input_ids=ids, position_ids=position_ids).logits[0, 4:] for ids in (input_ids, changed))
    finally:
        for module, training in modes:
            module.training = training
    # Masked tokens add exact zeros; the tolerance is for kernels that sum in another order.
    return bool((one - other).abs().max() > 0.01 * one.abs().max())
