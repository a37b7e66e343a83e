"""The data of a run, from the options: the tokenizer, what is trained on, and what is held out.

The ranks of a machine tokenize a data set together, each a part of it, and map what they made; see `losia_dist.data.cache`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from losia_dist import errors
from losia_dist.agreement import Agreement
from losia_dist.data import Records, cache, load_records, template_reads_date, train_validation_split, training_template
from losia_dist.data.build import pack
from losia_dist.data.dataset import Settings, TokenizedDataset, check_context, check_not_empty, tokenize
from losia_dist.errors import ConfigError, LoSiAError
from losia_dist.training.options import parse_columns

TRL = "trl"  # of --chat_template
OFF = "off"  # of --data_cache
_WORTH_A_BAR = 5_000  # records that take long enough to watch


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


class _Sources(NamedTuple):
    tokenizer: Any
    settings: Settings
    train: Records
    held_out: Records | None
    template_date: str | None


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
    started = time.monotonic()
    train, origin = _tokenized(sources, sources.train, options, agreement)
    seconds = time.monotonic() - started
    held_out = None if sources.held_out is None else _tokenized(sources, sources.held_out, options, agreement)[0]
    data = RunData(sources.tokenizer, train, held_out, sources.template_date, origin.format(seconds=seconds))
    if data.template_date:
        data.notes.append(f"the chat template writes the date: {day}, kept when the run is resumed (--template_date)")
    unused = getattr(train, "unused", None) or sorted(sources.train.unused)
    if unused:
        data.notes.append(f"not used of {sources.train.raw.name}: {', '.join(unused)}")
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
    records = load_records(options.train_file, options.form, columns, check=False)
    held_out = load_records(options.eval_file, options.form, columns, check=False) if options.eval_file else None
    if held_out is None and options.validation_size:
        records, held_out = train_validation_split(records, options.validation_size, options.seed)
    dated = records.form in ("chat", "instruction") and template_reads_date(tokenizer, template)
    if options.template_date and not dated:
        raise ConfigError(
            f"--template_date {options.template_date} has no effect: no chat template writes today's date here. Leave it out."
        )
    check_context(options.max_length, context_length(model_config))
    settings = Settings(options.max_length, options.overlong, template, date.fromisoformat(day) if dated else None)
    return _Sources(tokenizer, settings, records, held_out, day if dated else None)


class _Making(NamedTuple):
    """What the first rank of a machine found: the data set's name and where it is made; why not, where it cannot be kept."""

    key: str | None
    making: Path | None
    reason: str = ""


def _tokenized(
    sources: _Sources, records: Records, options: argparse.Namespace, agreement: Agreement
) -> tuple[TokenizedDataset, str]:
    """The data set, and in words where it comes from. Called by all ranks: each communicates the same, whatever it finds."""
    directory = None if options.data_cache == OFF else Path(options.data_cache or cache.default_directory()).absolute()
    tokenizer, settings = sources.tokenizer, sources.settings
    # Ranks on one machine that were given the same files share the work; one name in two directories is two files.
    alike = agreement.gather((platform.node(), str(directory), os.path.abspath("."), records.raw.name))
    members = [rank for rank, theirs in enumerate(alike) if theirs == alike[agreement.rank]]
    position = members.index(agreement.rank)

    def look() -> _Making:
        if position != 0 or directory is None:
            return _Making(None, None)
        key = cache.key_of(records, tokenizer, settings)
        if key is None or cache.find(directory, key, settings.max_length) is not None:
            return _Making(key, None)
        try:
            return _Making(key, cache.begin(directory, key))
        except OSError as error:
            return _Making(None, None, f" ({directory} cannot be written: {error.strerror}; see --data_cache)")

    found = agreement.gather(agreement.attempt(None, look))[members[0]]
    part = records[len(records) * position // len(members) : len(records) * (position + 1) // len(members)]

    def work() -> tuple[TokenizedDataset | None, tuple[str, str] | None]:
        try:
            if found.key is None:
                return tokenize(records, tokenizer, settings), None
            if found.making is not None:
                hidden = True if agreement.rank != 0 or len(part) < _WORTH_A_BAR else None  # None: unless no terminal is there
                with tqdm(total=len(part), desc="tokenizing", unit=" records", disable=hidden) as bar:
                    cache.write_part(found.making, position, part, tokenizer, settings, bar)
            return None, None
        except LoSiAError as error:
            return None, (type(error).__name__, str(error))

    dataset, failure = agreement.attempt(None, work)
    failures = agreement.gather(failure)
    if any(failures) and found.making is not None and position == 0:
        shutil.rmtree(found.making, ignore_errors=True)
    _raise_first(failures, whole=len(members) == agreement.world_size)

    def finish() -> None:
        if found.making is not None and found.key is not None and position == 0:
            try:
                cache.join(found.making, len(members), found.key)
            finally:
                shutil.rmtree(found.making, ignore_errors=True)

    def open_whole() -> TokenizedDataset:
        whole = dataset
        if directory is not None and found.key is not None:
            whole = cache.find(directory, found.key, settings.max_length)
        if whole is None:
            raise ConfigError(f"{directory}: the tokenized data that was there a moment ago is gone. Start again.")
        check_not_empty(whole.report(), records, settings.max_length)
        return whole

    agreement.attempt(None, finish)
    whole = agreement.attempt(None, open_whole)
    if found.key is None:
        return whole, f"tokenized by every rank for itself in {{seconds:.1f}} s{found.reason}"
    place = f"{directory / found.key}" if directory is not None else ""
    made = "found" if found.making is None else f"made by {len(members)} rank(s)"
    return whole, f"{made} in {{seconds:.1f}} s: {place}"


def _raise_first(failures: list[tuple[str, str] | None], whole: bool) -> None:
    """Raise the first of the ranks' errors, on all of them: their parts are in order, so that it is the first bad record."""
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, message = failure
            error: type[LoSiAError] = getattr(errors, kind)
            raise error(message if whole else f"rank {rank}: {message}")


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
