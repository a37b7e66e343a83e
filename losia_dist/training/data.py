"""The data of a run, from the options: the tokenizer, what is trained on, and what is held out."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from losia_dist.data import build_dataset, load_records, template_reads_date, train_validation_split, training_template
from losia_dist.errors import ConfigError
from losia_dist.training.options import parse_columns

TRL = "trl"  # of --chat_template


@dataclass
class RunData:
    """tokenizer and data sets. template_date: the day that the chat template writes, if it does. notes: what is to be said."""

    tokenizer: Any
    train: Any
    held_out: Any | None
    template_date: str | None
    notes: list[str] = field(default_factory=list)


def choose_template_date(options: argparse.Namespace, saved: dict[str, Any] | None) -> str:
    """The day that a chat template takes for today: --template_date, else that of the run that is gone on from, else today.

    Args:
        saved: what the checkpoint that is gone on from holds of the run (`trajectory.describe`).
    """
    return options.template_date or (saved or {}).get("template_date") or date.today().isoformat()


def load_data(options: argparse.Namespace, day: str) -> RunData:
    """Read and tokenize the data. Each rank by itself.

    Raises:
        LoSiAError: something is missing, malformed, or does not fit.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        model_config = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {options.model}: no model and tokenizer could be read: {error}") from error
    template = _chat_template(options, tokenizer)
    reading = {"form": options.form, "columns": parse_columns(options.columns)}
    records = load_records(options.train_file, **reading)
    held_out = load_records(options.eval_file, **reading) if options.eval_file else None
    if held_out is None and options.validation_size:
        records, held_out = train_validation_split(records, options.validation_size, options.seed)
    dated = records.form in ("chat", "instruction") and template_reads_date(tokenizer, template)
    if options.template_date and not dated:
        raise ConfigError(
            f"--template_date {options.template_date} has no effect: no chat template writes today's date here. Leave it out."
        )
    common = {
        "context_length": getattr(model_config.get_text_config(), "max_position_embeddings", None),
        "overlong": options.overlong,
        "packing": options.packing,
        "chat_template": template,
        "template_date": date.fromisoformat(day),
    }
    data = RunData(tokenizer, build_dataset(records, tokenizer, options.max_length, **common), None, day if dated else None)
    if held_out is not None:
        data.held_out = build_dataset(held_out, tokenizer, options.max_length, **common)
    if dated:
        data.notes.append(f"the chat template writes the date: {day}, kept when the run is resumed (--template_date)")
    if records.unused:
        data.notes.append(f"not used of {records.raw.name}: {', '.join(sorted(records.unused))}")
    return data


def _chat_template(options: argparse.Namespace, tokenizer: Any) -> str | None:
    """What is to be used in place of the tokenizer's own template, for training alone."""
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
