"""`build_dataset`: records to a tokenized data set, packed or not."""

from __future__ import annotations

from datetime import date
from typing import Any

from losia_dist.data.dataset import Settings, TokenizedDataset, _pad_id, check_context, check_not_empty, tokenize
from losia_dist.data.packing import PackedDataset
from losia_dist.data.records import Records


def build_dataset(
    records: Records,
    tokenizer: Any,
    max_length: int,
    *,
    context_length: int | None = None,
    overlong: str = "truncate",
    packing: bool = False,
    chat_template: str | None = None,
    template_date: date | None = None,
) -> TokenizedDataset | PackedDataset:
    """Tokenize `records`. Every rank calls it; the result depends on nothing but the arguments.

    Loss is on answers only (on all tokens of a text), the end of the turn or eos included; see `encoding`.

    max_length: tokens per example, or per row when packed.
    context_length: the model's longest sequence in tokens (`model.config.max_position_embeddings`), if it has one.
    overlong: what to do with a longer record: "truncate" keeps the first `max_length` tokens (it then has no end of
        turn to learn, and it is dropped if no answer is left), "drop" drops it, "error" raises.
    packing: put several records into each row of exactly `max_length` tokens; see the module `packing`, also for what
        the model needs.
    chat_template: a Jinja template in place of the tokenizer's.
    template_date: what a chat template that writes the date takes for today (None: today).

    Raises: DataError when `max_length` is above `context_length`, the tokenizer cannot serve the records, a record is
    too long and `overlong` is "error", or no example is left; ConfigError for a setting that cannot work.
    """
    settings = Settings(max_length, overlong, chat_template, template_date)
    check_context(max_length, context_length)
    dataset = tokenize(records, tokenizer, settings)
    check_not_empty(dataset.report(), records.name, max_length)
    return pack(dataset, tokenizer) if packing else dataset


def pack(dataset: TokenizedDataset, tokenizer: Any) -> PackedDataset:
    """`dataset` in rows of its `max_length`."""
    return PackedDataset(dataset, dataset.max_length, _pad_id(tokenizer))
