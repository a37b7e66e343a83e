"""What a written model directory needs to be generated with: a tokenizer, the model's own code, tokens that end a text."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from losia_dist.checkpoint import atomic_files
from losia_dist.export.beside import TEMPLATES

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_ANSWER = "an answer that no template contains"


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer or processor by its own `save_pretrained`; templates that were copied before give way to its own.

    Where it has none, those stay: a processor's stands beside a tokenizer that knows nothing of it.
    """
    if getattr(tokenizer, "chat_template", None):
        shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
        for copied in directory.glob("chat_template.*"):
            copied.unlink()
    tokenizer.save_pretrained(str(directory))


def end_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that end what the model is to write: eos, and the one that ends a turn in the chat template. id -> token."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    eos = getattr(tokenizer, "eos_token_id", None)
    found = {} if eos is None else {int(eos): str(tokenizer.eos_token)}
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            after = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"] if _ANSWER in text else []
        except Exception:  # templates refuse chats with errors of their own; such a one ends no turn that is known here
            return found
        special = set(tokenizer.all_special_ids) | {
            number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
        }
        ends = next((number for number in after if number in special), None)
        if ends is not None:
            found[int(ends)] = str(tokenizer.convert_ids_to_tokens(ends))
    return found


def add_end_tokens(directory: Path, tokenizer: Any = None) -> None:
    """Let generation stop where the model learned to: what `end_tokens` has goes into generation_config.json, with a warning.

    The file is changed, and not the model's configuration: Transformers refuses to save a changed one that it warns of.

    Args:
        tokenizer: None: the one in the directory, if it can be read without code of its own.
    """
    there = _read(directory / GENERATION)
    if there is None:
        return  # a model that does not generate
    tokenizer = tokenizer if tokenizer is not None else _tokenizer_in(directory)
    ends = {} if tokenizer is None else end_tokens(tokenizer)
    stops = there.get("eos_token_id")
    known = [] if stops is None else stops if isinstance(stops, list) else [stops]
    added = {number: token for number, token in ends.items() if number not in known}
    if not added:
        return
    stops = [*known, *added]
    content = {**there, "eos_token_id": stops if len(stops) > 1 else stops[0]}
    atomic_files.write_text(directory / GENERATION, json.dumps(content, indent=2) + "\n")
    named = ", ".join(f"{token!r} ({number})" for number, token in added.items())
    warnings.warn(
        f"{named}, which by the tokenizer ends what the model writes, was not among the eos_token_id of generation_config.json "
        f"({known}): added in the written model, so that generation stops there.",
        stacklevel=2,
    )


def missing_for_inference(directory: Path) -> list[str]:
    """What the directory lacks to be used by `from_pretrained` and a chat, each as a phrase with the fix."""
    config = _read(directory / CONFIG)
    if config is None:
        return []  # no model of Transformers
    there = {path.name for path in directory.iterdir()}
    missing = []
    if not there & {*TOKENIZERS, *_PROCESSORS}:
        missing.append("a tokenizer (pass tokenizer=, or base_model=, the directory of the model that was fine-tuned)")
    elif any(name.endswith(("vision_config", "audio_config")) for name in config) and not there & set(_PROCESSORS):
        missing.append("a processor for pictures or sound (pass it as tokenizer=, or base_model=)")
    named = [
        name for names in (config.get("auto_map") or {}).values() for name in (names if isinstance(names, list) else [names])
    ]
    modules = sorted({f"{name.split('.')[0]}.py" for name in named if name and "--" not in name} - there)
    if modules:
        missing.append(f"code of the model's own, {', '.join(modules)} (pass base_model=, or copy the files)")
    return missing


def _tokenizer_in(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception:  # one that needs code of its own, or that only its own library reads: it was copied all the same
        return None


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
