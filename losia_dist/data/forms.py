"""The forms of a record. Each has one canonical shape that the encoders read.

instruction   {"instruction": str, "input": str, "output": str}    prompt/response too; with Alpaca's `system` and `history`
chat          {"messages": [{"role": str, "content": str, ...}, ...]}    ShareGPT's `conversations`, TRL's prompt/completion too
continuation  {"prompt": str, "completion": str}    TRL's: the completion goes on where the prompt ends, without a template
text          {"text": str}

What else decides how a chat is written stands beside: "tools", "variables" (TRL's chat_template_kwargs, and documents).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from losia_dist.data.messages import keys_of, parse_json, read_messages, read_tools, show, strings_in
from losia_dist.data.template import NOT_CHARACTERS
from losia_dist.errors import ConfigError, DataError

FORMS = ("instruction", "chat", "continuation", "text")

_MESSAGES = re.compile(r'\s*\[\s*\{\s*"role"')  # as JSON text
_CHAT_KEYS = ("messages", "conversations", "conversation")
# (question, answer) keys, in the order in which they are looked for.
_INSTRUCTION_KEYS = (("instruction", "output"), ("prompt", "response"), ("instruction", "response"))

_NEEDS = {
    "instruction": "'instruction' and 'output' (or 'prompt' and 'response')",
    "chat": "'messages', a list of {role, content} (or 'conversations', of {from, value})",
    "continuation": "'prompt' and 'completion'",
    "text": "'text'",
}
_OF_CHATS = ("tools", "functions", "chat_template_kwargs", "documents", "system")
_READ: dict[str, tuple[str, ...]] = {
    "instruction": (*_OF_CHATS, "history", "input"),
    "chat": _OF_CHATS,
    "continuation": (),
    "text": (),
}
# Keys that change what a record means, and what to do where the record's form has no place for them.
_MEANINGFUL = {
    **dict.fromkeys(("tools", "functions", "documents", "chat_template_kwargs"), "give the record as messages"),
    "system": "give the record as messages, or as an instruction",
    "history": "give the record as an instruction, or write it into the messages",
    "weight": "weights stand in messages",
    **dict.fromkeys(("chosen", "rejected"), "preferences are for TRL's trainers (see README), answers alone are learned here"),
    "input_ids": "give text, which is tokenized here",
    **dict.fromkeys(("labels", "completion_mask", "assistant_masks"), "give text; what is learned follows from the form"),
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "text alone is learned here"),
}


def detect_form(row: Mapping[str, Any], where: str) -> str:
    """The form of `row`, a data set's first record.

    `messages` is looked for first and `text` last: published instruction data sets often carry a rendered `text` too.

    Raises: DataError when no form fits.
    """
    if _chat_key(row) is not None or _is_chat_in_two(row):
        return "chat"
    if _instruction_keys(row) is not None:
        return "instruction"
    if row.get("prompt") is not None and row.get("completion") is not None:
        return "continuation"
    if row.get("text") is not None:
        return "text"
    needs = "; ".join(f"{form}: {_NEEDS[form]}" for form in FORMS)
    raise DataError(
        f"{where}: the record fits no form. It has {keys_of(row)}. A record needs, for {needs}. Other names are given with "
        "--columns, for example question=instruction answer=output."
    )


def check_form(form: str) -> str:
    """`form` itself. Raises: ConfigError when it is not one of `FORMS`."""
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is unknown. Give one of {', '.join(map(repr, FORMS))}, or None to detect it.")
    return form


def canonical(row: Mapping[str, Any], form: str, where: str, unused: set[str] | None = None) -> dict[str, Any]:
    """`row` in the canonical shape of `form`, checked. `where` names its file and line in messages.

    A key whose value is null counts as missing: columnar storage fills optional keys with nulls. unused: gets the keys that
    are not read.

    Raises: DataError for a missing key, a value of the wrong type, or a key that changes the meaning and has no place here.
    """
    read: tuple[str, ...]
    if form == "instruction":
        keys = _instruction_keys(row)
        if keys is None:
            raise _missing(row, form, where)
        record, read = _instruction(row, *keys, where), keys
    elif form == "chat":
        record, read = _chat(row, where)
    else:
        read = ("prompt", "completion") if form == "continuation" else ("text",)
        if any(row.get(key) is None for key in read):
            raise _missing(row, form, where)
        record = {key: _text(row, key, where) for key in read}
    for key, value in row.items():
        if key in read or key in _READ[form] or value is None:
            continue
        if key in _MEANINGFUL and _means_something(key, value):
            raise DataError(
                f"{where}: '{key}' has no place in a record of the form '{form}': {_MEANINGFUL[key]}, or remove the key."
            )
        if unused is not None:
            unused.add(key)
    _check_characters(record, where)
    return record


def as_messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a canonical chat or instruction record; an input follows its instruction after an empty line."""
    if "messages" in record:
        return record["messages"]
    question = record["instruction"] + ("\n\n" + record["input"] if record["input"] else "")
    turns = [*record.get("history", []), (question, record["output"])]
    messages = [{"role": "system", "content": record["system"]}] if "system" in record else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def _instruction(row: Mapping[str, Any], question: str, answer: str, where: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "instruction": _text(row, question, where),
        "input": _text(row, "input", where) if row.get("input") is not None else "",
        "output": _text(row, answer, where),
    }
    if row.get("system"):
        record["system"] = _text(row, "system", where)
    history = parse_json(row.get("history"), where, "history")
    if history:
        turns = history if isinstance(history, list) else [None]
        if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns):
            raise DataError(f"{where}: 'history' must be a list of [question, answer], got {show(history)}.")
        record["history"] = [tuple(turn) for turn in history]
    return record | _beside(row, where)


def _chat(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    key = _chat_key(row)
    if key is not None:
        read: tuple[str, ...] = (key,)
        messages = row[key]
    elif _is_chat_in_two(row):
        read = ("prompt", "completion")
        prompt, completion = (_parsed(row[key], where, key) for key in read)
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise DataError(f"{where}: 'prompt' and 'completion' must both be texts, or both lists of messages.")
        # As TRL does: of these chats the completion alone is learned.
        context = [{**m, "weight": 0} if isinstance(m, Mapping) and m.get("role") == "assistant" else m for m in prompt]
        messages = context + completion
    else:
        raise _missing(row, "chat", where)
    checked = read_messages(_parsed(messages, where, read[0]), where, read[0])
    if row.get("system"):
        if checked[0]["role"] in ("system", "developer"):
            raise DataError(f"{where}: 'system' stands beside messages that begin with a system message. Leave one out.")
        checked.insert(0, {"role": "system", "content": _text(row, "system", where)})
    return {"messages": checked} | _beside(row, where), read


def _beside(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tools and variables of a record."""
    found: dict[str, Any] = {}
    for key in ("tools", "functions"):
        tools = read_tools(row.get(key), where, key)
        if tools is not None and "tools" in found:
            raise DataError(f"{where}: 'tools' and 'functions' both name tools. Leave one of them out.")
        if tools is not None:
            bare = key == "functions"  # OpenAI's older name, for the functions themselves
            found["tools"] = [{"type": "function", "function": tool} for tool in tools] if bare else tools
    variables = parse_json(row.get("chat_template_kwargs"), where, "chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object, got {show(variables)}.")
    variables = {key: value for key, value in variables.items() if value is not None}
    if row.get("documents"):
        variables["documents"] = row["documents"]
    if variables:
        found["variables"] = variables
    return found


def _means_something(key: str, value: Any) -> bool:
    if key in ("input_ids", "labels", "completion_mask", "assistant_masks"):
        return isinstance(value, list)  # not a class label of that name
    return value not in ("", [], {}) and not (key == "weight" and value == 1)


def _check_characters(record: Mapping[str, Any], where: str) -> None:
    for path, text in strings_in(record):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: '{path}' holds half of a character (\\u{ord(text[error.start]):04x}, a lone surrogate) at position "
                f"{error.start}, which is no text: remove it, or write the whole character."
            ) from error
        found = next((character for character in NOT_CHARACTERS if character in text), None)
        if found is not None:
            raise DataError(f"{where}: '{path}' holds U+{ord(found):04X}, which is no character: remove it.")


def _chat_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in _CHAT_KEYS if row.get(key) is not None), None)


def _is_chat_in_two(row: Mapping[str, Any]) -> bool:
    """TRL's prompt and completion as lists of messages."""
    parts = (row.get("prompt"), row.get("completion"))
    if any(part is None for part in parts):
        return False
    return any(isinstance(part, list) for part in parts) or all(
        _MESSAGES.match(part) for part in parts if isinstance(part, str)
    )


def _parsed(messages: Any, where: str, key: str) -> Any:
    """Messages that a table of texts holds as JSON."""
    return parse_json(messages, where, key) if isinstance(messages, str) and messages.lstrip().startswith("[") else messages


def _instruction_keys(row: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((keys for keys in _INSTRUCTION_KEYS if all(row.get(key) is not None for key in keys)), None)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string, got {show(value)}.")
    return value


def _missing(row: Mapping[str, Any], form: str, where: str) -> DataError:
    return DataError(
        f"{where}: a record of the form '{form}' needs {_NEEDS[form]}. It has {keys_of(row)}. "
        "All records of a data set must have one form; pass form=... if the wrong one was detected from the first."
    )
