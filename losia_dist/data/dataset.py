"""`TokenizedDataset`: records as token ids of bounded length, with a report of what was cut and dropped."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, fields
from datetime import date
from itertools import pairwise
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from losia_dist.data.encoding import Encoded, encode
from losia_dist.data.records import Records
from losia_dist.errors import ConfigError, DataError

IGNORED = -100  # a label that carries no loss, as in torch.nn.CrossEntropyLoss and Transformers
OVERLONG = ("truncate", "drop", "error")


@dataclass(frozen=True)
class Report:
    """What a data set holds and what became of the records that do not fit.

    examples: records that are kept. tokens: theirs, padding not counted. answer_tokens: tokens that carry loss.
    truncated: kept records that were cut to `max_length`. dropped_overlong: records dropped for their length.
    dropped_unanswered: records in which no token that carries loss was left.
    longest: tokens of the longest record, before it was cut.
    rows, row_tokens: rows of a packed data set and all their tokens with padding; 0 when it is not packed.
    """

    examples: int
    tokens: int
    answer_tokens: int
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_unanswered: int = 0
    longest: int = 0
    rows: int = 0
    row_tokens: int = 0

    def __str__(self) -> str:
        text = (
            f"{self.examples:,} examples, {self.tokens:,} tokens, {self.answer_tokens:,} of them learned; "
            f"{self.truncated:,} truncated, {self.dropped_overlong:,} dropped as too long, "
            f"{self.dropped_unanswered:,} dropped without an answer"
        )
        if self.truncated or self.dropped_overlong or self.dropped_unanswered:
            text += f" (a max_length of {self.longest:,} would keep all whole)"
        if self.rows:
            text += f"; packed into {self.rows:,} rows, {self.tokens / self.row_tokens:.1%} full"
        return text

    def __add__(self, other: Report) -> Report:
        """Of two parts of one data set."""
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return Report(**added | {"longest": max(self.longest, other.longest)})


@dataclass(frozen=True)
class Settings:
    """How records become tokens; see `build.build_dataset`. Raises: ConfigError for a setting that cannot work."""

    max_length: int
    overlong: str = "truncate"
    chat_template: str | None = None
    template_date: date | None = None

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            raise ConfigError(f"overlong={self.overlong!r} is unknown. Give one of {', '.join(map(repr, OVERLONG))}.")
        if self.max_length < 2:
            raise ConfigError(f"max_length={self.max_length}: give at least 2 tokens, one to read and one to predict.")


class TokenizedDataset(Dataset[dict[str, Tensor]]):
    """Examples of any length up to `max_length`: `input_ids` and `labels`, int64 [length] each.

    `labels` is -100 where no loss is wanted, always at position 0. A token takes 5 bytes of memory: an int32 id and a
    flag.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._ids = array("i")
        self._learned = bytearray()
        self._ends = array("q", [0])
        self._counts = dict.fromkeys(("truncated", "dropped_overlong", "dropped_unanswered", "longest"), 0)

    def append(self, encoded: Encoded) -> None:
        """Add one example, which must not be longer than `max_length`."""
        self._ids.extend(encoded.ids)
        self._learned.extend(encoded.learned)
        self._ends.append(len(self._ids))

    def add(self, encoded: Encoded, overlong: str) -> None:
        """Add one record, dealing with its length. Raises: DataError when it is too long and `overlong` is "error"."""
        length = len(encoded.ids)
        self._counts["longest"] = max(self._counts["longest"], length)
        if length > self.max_length:
            if overlong == "error":
                raise DataError(
                    f"the record has {length} tokens, more than max_length={self.max_length}. Raise max_length, "
                    "shorten the record, or set overlong to 'truncate' or 'drop'."
                )
            if overlong == "drop":
                self._counts["dropped_overlong"] += 1
                return
            encoded = Encoded(encoded.ids[: self.max_length], encoded.learned[: self.max_length])
        if not any(encoded.learned):
            self._counts["dropped_unanswered"] += 1
            return
        self._counts["truncated"] += length > self.max_length
        self.append(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self._span(index)
        ids = torch.frombuffer(self._ids, dtype=torch.int32, count=end - start, offset=start * 4)
        learned = torch.frombuffer(self._learned, dtype=torch.bool, count=end - start, offset=start)
        input_ids = ids.to(torch.int64)  # a copy: a view would forbid adding examples
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(~learned, IGNORED)}

    def length(self, index: int) -> int:
        """Tokens of example `index`."""
        start, end = self._span(index)
        return end - start

    def fingerprint(self) -> str:
        """A hash of all examples in their order, to compare between ranks."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self._ids, self._learned, self._ends):
            digest.update(memoryview(part))
        return digest.hexdigest()

    def write(self, ids: IO[bytes], learned: IO[bytes], lengths: IO[bytes]) -> None:
        """Append the examples to files: tokens, what is learned of them, and how long each example is (int64)."""
        ids.write(memoryview(self._ids))
        learned.write(memoryview(self._learned))
        lengths.write(memoryview(array("q", (end - start for start, end in pairwise(self._ends)))))

    def report(self) -> Report:
        return Report(len(self), len(self._ids), sum(self._learned), **self._counts)

    def _span(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._ends[index], self._ends[index + 1]


def tokenize(records: Records, tokenizer: Any, settings: Settings) -> TokenizedDataset:
    """Tokenize `records`, of which nothing may be left. Raises: DataError, naming the record."""
    dataset = TokenizedDataset(settings.max_length)
    all_encoded = encode(records, tokenizer, chat_template=settings.chat_template, template_date=settings.template_date)
    for index, encoded in enumerate(all_encoded):
        try:
            dataset.add(encoded, settings.overlong)
        except DataError as error:
            raise DataError(f"{records.place(index)}: {error}") from None
    return dataset


def check_context(max_length: int, context_length: int | None) -> None:
    """Raises: DataError when examples may be longer than the model's context."""
    if context_length is not None and max_length > context_length:
        raise DataError(
            f"max_length={max_length} is above the model's context of {context_length} tokens "
            f"(max_position_embeddings). Set max_length to {context_length} or less."
        )


def check_not_empty(report: Report, name: str, max_length: int) -> None:
    """Raises: DataError when no example is left of the source of this name."""
    if report.examples == 0:
        records = report.dropped_overlong + report.dropped_unanswered
        raise DataError(
            f"{name}: no example is left of {records} records at max_length={max_length}: "
            f"{report.dropped_overlong} were too long and dropped, {report.dropped_unanswered} had no answer token. "
            f"Raise max_length ({report.longest:,} would keep all whole), or shorten the prompts."
        )


def _pad_id(tokenizer: Any) -> int:
    # Any token would do: padding is told by position, never by its id.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
