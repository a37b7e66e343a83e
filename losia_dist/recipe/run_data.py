"""The data of a run, from the options: the tokenizer, what is trained on, and what is held out."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer

from losia_dist.data import Records, cache, load_records, template_reads_date, train_validation_split, training_template
from losia_dist.data.build import pack
from losia_dist.data.dataset import Settings, check_context
from losia_dist.data.streaming import Stream
from losia_dist.errors import ConfigError
from losia_dist.ranks.agreement import Agreement
from losia_dist.recipe.options import parse_columns
from losia_dist.recipe.shared_data import OFF, Shared, Tokenizing

TRL = "trl"  # of --chat_template


@dataclass
class RunData:
    """tokenizer and data sets. template_date: the day that the chat template writes, if it does. notes: what is to be said.

    origin: where the tokens of the training data come from.
    """

    tokenizer: Any
    train: Any
    held_out: Any | None
    template_date: str | None
    origin: str
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> dict[str, Any]:
        """Numbers that must be equal on all ranks, since each takes its slice of the same data."""
        names = {"training": self.train, "held-out": self.held_out}
        return {
            f"{what} of the {name} examples": value
            for name, dataset in names.items()
            if dataset is not None
            for what, value in (("count", len(dataset)), ("hash", dataset.fingerprint()))
        }


class _Sources(NamedTuple):
    tokenizer: Any
    settings: Settings
    train: Records | Stream
    held_out: Records | None
    template_date: str | None

    def work(self, is_held_out: bool) -> Tokenizing:
        records = self.held_out if is_held_out and self.held_out is not None else self.train
        return Tokenizing(records, self.tokenizer, self.settings)


def _read_again(options: argparse.Namespace, day: str, is_held_out: bool) -> Tokenizing:
    return _read(options, day).work(is_held_out)


def choose_template_date(options: argparse.Namespace, saved: dict[str, Any] | None) -> str:
    """The day that a chat template takes for today: --template_date, else that of the run that is gone on from, else today.

    Args:
        saved: what the checkpoint that is gone on from holds of the run (`trajectory.describe`).
    """
    return options.template_date or (saved or {}).get("template_date") or date.today().isoformat()


def load_data(options: argparse.Namespace, agreement: Agreement, day: str) -> RunData:
    """Read and tokenize the data. Called by all ranks.

    Args:
        day: that a chat template is to take for today.

    Raises:
        LoSiAError: something is missing, malformed, or does not fit; the same on all ranks.
    """
    sources = agreement.attempt(None, lambda: _read(options, day))
    directory = None if options.data_cache == OFF else Path(options.data_cache or cache.default_directory()).absolute()
    shared = Shared(agreement, directory, options.data_workers)
    started = time.monotonic()
    train, origin = shared.load(sources.work(False), partial(_read_again, options, day, False))
    seconds = time.monotonic() - started
    held_out = None
    if sources.held_out is not None:
        held_out, _ = shared.load(sources.work(True), partial(_read_again, options, day, True))
    data = RunData(sources.tokenizer, train, held_out, sources.template_date, origin.format(seconds=seconds))
    if data.template_date:
        data.notes.append(f"the chat template writes the date: {day}, kept when the run is resumed (--template_date)")
    unused = getattr(train, "unused", None) or sorted(sources.train.unused)
    if unused:
        data.notes.append(f"not used of {sources.train.name}: {', '.join(unused)}")
    if options.packing:
        data.train = agreement.attempt(None, lambda: pack(train, sources.tokenizer))
        data.held_out = held_out if held_out is None else agreement.attempt(None, lambda: pack(held_out, sources.tokenizer))
    return data


def context_length(config: Any) -> int | None:
    """The longest sequence that a model's configuration allows: its positions, and what their scaling makes of them."""
    text = config.get_text_config()
    longest: int | None = getattr(text, "max_position_embeddings", None)
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for rope in [given, *(kind for kind in given.values() if isinstance(kind, dict))]:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if longest is not None and kind != "default" and rope.get("factor"):
            longest = max(longest, int((rope.get("original_max_position_embeddings") or longest) * rope["factor"]))
    return longest


def _read(options: argparse.Namespace, day: str) -> _Sources:
    """What is tokenized, and how; records are checked when they are tokenized. Each rank by itself."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        model_config = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {options.model}: no model and tokenizer could be read: {error}") from error
    template = chat_template_of(options, tokenizer)
    columns = parse_columns(options.columns)
    records: Records | Stream
    if options.streaming:
        records = Stream(options.train_file, options.form, columns)
    else:
        records = load_records(options.train_file, options.form, columns, check=False)
    held_out = load_records(options.eval_file, options.form, columns, check=False) if options.eval_file else None
    if held_out is None and options.validation_size and isinstance(records, Records):
        records, held_out = train_validation_split(records, options.validation_size, options.seed)
    dated = records.form in ("chat", "instruction") and template_reads_date(tokenizer, template)
    if options.template_date and not dated:
        raise ConfigError(
            f"--template_date {options.template_date} has no effect: no chat template writes today's date here. Leave it out."
        )
    check_context(options.max_length, context_length(model_config))
    settings = Settings(options.max_length, options.overlong, template, date.fromisoformat(day) if dated else None)
    return _Sources(tokenizer, settings, records, held_out, day if dated else None)


def chat_template_of(options: argparse.Namespace, tokenizer: Any) -> str | None:
    """What is to be used in place of the tokenizer's own template, for training alone. A file becomes the tokenizer's own.

    Raises: ConfigError.
    """
    if options.chat_template == TRL:
        return training_template(tokenizer)
    if options.chat_template is not None:
        try:
            # The trained model's template is this one from now on, and is saved with it.
            tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--chat_template {options.chat_template} cannot be read: {error}. Give a Jinja file, or {TRL}."
            ) from error
    return None
