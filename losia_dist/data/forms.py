"""The three forms of a record: instruction, chat and text. Each has one canonical shape that the encoders read.

instruction  {"instruction": str, "input": str, "output": str}    also read from prompt/response or prompt/completion
chat         {"messages": [{"role": str, "content": str, ...}, ...]}
text         {"text": str}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from losia_dist.errors import ConfigError, DataError

FORMS = ("instruction", "chat", "text")
ROLES = ("system", "user", "assistant", "tool")

# (question, answer) keys, in the order in which they are looked for.
_INSTRUCTION_KEYS = (("instruction", "output"), ("prompt", "response"), ("prompt", "completion"))

_NEEDS = {
    "instruction": "'instruction' and 'output' (or 'prompt' with 'response' or 'completion')",
    "chat": "'messages', a list of {role, content}",
    "text": "'text'",
}


def detect_form(row: Mapping[str, Any], where: str) -> str:
    """The form of `row`, a data set's first record.

    `messages` is looked for first and `text` last: published instruction data sets often carry a rendered `text` too.

    Raises: DataError when no form fits.
    """
    if row.get("messages") is not None:
        return "chat"
    if _instruction_keys(row) is not None:
        return "instruction"
    if row.get("text") is not None:
        return "text"
    needs = "; ".join(f"{form}: {_NEEDS[form]}" for form in FORMS)
    raise DataError(f"{where}: the record fits no form. It has {_keys(row)}. A record needs, for {needs}.")


def check_form(form: str) -> str:
    """`form` itself. Raises: ConfigError when it is not one of `FORMS`."""
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is unknown. Give one of {', '.join(map(repr, FORMS))}, or None to detect it.")
    return form


def canonical(row: Mapping[str, Any], form: str, where: str) -> dict[str, Any]:
    """`row` in the canonical shape of `form`, checked. `where` names its file and line in messages.

    A key whose value is null counts as missing: columnar storage fills optional keys with nulls.

    Raises: DataError for a missing key or a value of the wrong type.
    """
    if form == "instruction":
        keys = _instruction_keys(row)
        if keys is None:
            raise _missing(row, form, where)
        question, answer = keys
        return {
            "instruction": _text(row, question, where),
            "input": _text(row, "input", where) if row.get("input") is not None else "",
            "output": _text(row, answer, where),
        }
    key = "messages" if form == "chat" else "text"
    if row.get(key) is None:
        raise _missing(row, form, where)
    if form == "chat":
        return {"messages": _messages(row["messages"], where)}
    return {"text": _text(row, "text", where)}


def as_messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a canonical chat or instruction record; an input follows its instruction after an empty line."""
    if "messages" in record:
        return record["messages"]
    question = record["instruction"] + ("\n\n" + record["input"] if record["input"] else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a non-empty list of {{role, content}}, got {_show(messages)}.")
    checked = []
    for index, message in enumerate(messages):
        here = f"{where}, message {index}"
        if not isinstance(message, Mapping):
            raise DataError(f"{here}: expected an object with 'role' and 'content', got {_show(message)}.")
        # Other keys (name, tool_call_id, reasoning_content, ...) are the chat template's to read.
        message = {key: value for key, value in message.items() if value is not None}
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f"{here}: '{key}' is missing. It has {_keys(message)}.")
            _text(message, key, here)
        if message["role"] not in ROLES:
            raise DataError(f"{here}: unknown role {message['role']!r}. Give one of {', '.join(map(repr, ROLES))}.")
        checked.append(message)
    if all(message["role"] != "assistant" for message in checked):
        raise DataError(f"{where}: no message has the role 'assistant', so that there is no answer to learn. Remove it.")
    if checked[0]["role"] == "assistant":
        raise DataError(f"{where}, message 0: a chat cannot start with the assistant. Put a user or system message first.")
    return checked


def _instruction_keys(row: Mapping[str, Any]) -> tuple[str, str] | None:
    for keys in _INSTRUCTION_KEYS:
        if all(row.get(key) is not None for key in keys):
            return keys
    return None


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string, got {_show(value)}.")
    return value


def _missing(row: Mapping[str, Any], form: str, where: str) -> DataError:
    return DataError(
        f"{where}: a record of the form '{form}' needs {_NEEDS[form]}. It has {_keys(row)}. "
        "All records of a data set must have one form; pass form=... if the wrong one was detected from the first."
    )


def _keys(row: Mapping[str, Any]) -> str:
    present = [repr(key) for key, value in row.items() if value is not None]
    return ", ".join(present) if present else "no keys"


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
