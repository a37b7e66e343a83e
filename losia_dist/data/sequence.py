"""Each rank's part of the sequences of a batch, where several ranks compute them together (sequence parallelism)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from losia_dist.data.dataset import IGNORED
from losia_dist.errors import ConfigError


def split_sequence(batch: Mapping[str, Tensor], *, rank: int, size: int, pad_token_id: int | None = None) -> dict[str, Tensor]:
    """What rank `rank` of the `size` ranks that share the sequences of a batch is to compute. No communication.

    All of them are given the same batch, preferably on the CPU. Each gets L / size neighbouring tokens of every row:
    `input_ids`, `position_ids` of the whole sequence, and `shift_labels`, the target of each token, which may lie on another
    rank. `labels` are the same: Transformers' models compute no loss without them.

    Args:
        batch: int64 [B, L]: `input_ids`; `labels`; maybe `position_ids` (which restart at 0 for packed records; [1, L] or
            [B, L]); maybe `attention_mask`, whose zeros may only stand on the right. It is left out: no token sees what comes
            after it.
        pad_token_id: what rows are filled up with on the right, to a length that `size` divides.

    Raises:
        ConfigError: a length that `size` does not divide, without pad_token_id; a mask with zeros elsewhere; no labels.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank={rank} of size={size} ranks that share a sequence: ranks run from 0 to size - 1.")
    if "labels" not in batch:
        raise ConfigError(
            "the batch has no labels: targets must be made before a sequence is cut, as they lie one token ahead."
        )
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    if mask is not None and (mask[:, 1:] > mask[:, :-1]).any():
        raise ConfigError(
            "the attention_mask has zeros that are not on the right: ranks that share a sequence pass no mask on, and tokens "
            "would see padding before them. Pad on the right."
        )
    rows, length = ids.shape
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=ids.device)[None]
    positions = positions.expand(rows, -1)
    lacking = -length % size
    if lacking and pad_token_id is None:
        raise ConfigError(
            f"a length of {length} tokens is not divided by the {size} ranks that share each sequence: pad batches to a "
            f"multiple of {size} (pad_to_multiple_of), or pass pad_token_id."
        )
    if lacking:
        ids = functional.pad(ids, (0, lacking), value=pad_token_id)
        labels = functional.pad(labels, (0, lacking), value=IGNORED)
        # A record of its own, if records are packed; else the row goes on.
        begins = 0 if bool((positions[:, 1:] <= positions[:, :-1]).any()) else length
        filled = torch.arange(begins, begins + lacking, device=ids.device).expand(rows, -1)
        positions = torch.cat([positions, filled], dim=1)
    targets = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    part = ids.shape[1] // size
    here = slice(rank * part, (rank + 1) * part)
    shift_labels = targets[:, here].contiguous()
    return {
        "input_ids": ids[:, here].contiguous(),
        "position_ids": positions[:, here].contiguous(),
        "labels": shift_labels,
        "shift_labels": shift_labels,
    }
