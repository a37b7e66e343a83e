"""Messages as people have them, in one shape: {"role": str, "content": str or text parts, "tool_calls": [...], ...}.

Read are OpenAI's messages and ShareGPT's (`from` and `value`), with the role names that are in use for both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from losia_dist.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

# Other names of the roles. A function_call is an assistant's turn whose text is the call.
_ROLE_NAMES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}
# What would be learned wrongly, or not at all, if it were left out.
_NOT_READ = {
    "refusal": "write the refusal as the message's content",
    "audio": "text alone is learned here",
    "images": "text alone is learned here",
}


def read_messages(messages: Any, where: str, key: str = "messages") -> list[dict[str, Any]]:
    """`messages` checked and in one shape. A value that is null counts as missing.

    An assistant message that is not to be learned has "learned": False; no other has that key. Keys that are not read here
    (name, tool_call_id, reasoning_content, ...) are the chat template's to read.

    Raises: DataError, naming `where` and the message.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: '{key}' must be a non-empty list of {{role, content}}, got {show(messages)}.")
    checked = [_message(message, f"{where}, message {index}") for index, message in enumerate(messages)]
    if all(message["role"] != "assistant" for message in checked):
        raise DataError(f"{where}: no message has the role 'assistant', so that there is no answer to learn. Remove it.")
    if checked[0]["role"] == "assistant":
        raise DataError(f"{where}, message 0: a chat cannot start with the assistant. Put a user or system message first.")
    return checked


def read_tools(tools: Any, where: str, key: str = "tools") -> list[dict[str, Any]] | None:
    """Tools as a list of objects, from such a list or from JSON text; None where there are none. Raises: DataError."""
    tools = parse_json(tools, where, key)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: '{key}' must be a list of tools, or such a list as JSON text, got {show(tools)}.")
    # One JSON text for each tool is a form too: columnar storage cannot hold schemas that differ.
    read = [parse_json(tool, where, key) for tool in tools]
    for tool in read:
        if not isinstance(tool, Mapping) or not isinstance(tool_name(tool), str):
            raise DataError(f"{where}: each of '{key}' must be an object with a 'name' (in its 'function'), got {show(tool)}.")
    return [dict(tool) for tool in read]


def tool_name(tool: Mapping[str, Any]) -> Any:
    """The name of a tool or of a call, which stands in its "function" or beside it."""
    inner = tool.get("function")
    return inner.get("name") if isinstance(inner, Mapping) else tool.get("name")


def parse_json(value: Any, where: str, key: str) -> Any:
    """A text as JSON, None if it is empty; any other value as it is. Raises: DataError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"{where}: '{key}' is no JSON: {error}. Give valid JSON, or an object in place of the text.") from error


def strings_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in nested lists and objects, keys among them, with the path to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield path, str(key)
            yield from strings_in(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from strings_in(item, f"{path}[{index}]")


def keys_of(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key, value in record.items() if value is not None) or "no keys"


def show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _message(given: Any, here: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DataError(f"{here}: expected an object with 'role' and 'content', got {show(given)}.")
    message = {key: value for key, value in given.items() if value is not None}
    for other, key in (("from", "role"), ("value", "content")):  # ShareGPT's names
        if other in message and key not in message:
            message[key] = message.pop(other)
    role = message.get("role")
    if role is None:
        raise DataError(f"{here}: 'role' is missing. It has {keys_of(message)}.")
    if not isinstance(role, str):
        raise DataError(f"{here}: 'role' must be a string, got {show(role)}.")
    if role not in _ROLE_NAMES:
        others = ", ".join(repr(name) for name in _ROLE_NAMES if name not in ROLES)
        raise DataError(f"{here}: unknown role {role!r}. Give one of {', '.join(map(repr, ROLES))} (or {others}).")
    for key, fix in _NOT_READ.items():
        if message.pop(key, None):
            raise DataError(f"{here}: '{key}' cannot be used: {fix}, or remove it.")
    message["role"] = _ROLE_NAMES[role]
    if message["role"] == "function_call":
        message |= {"role": "assistant", "tool_calls": _calls_in_text(message.pop("content", None), here)}
    _read_calls(message, here)
    if "content" in message:
        message["content"] = _content(message["content"], here)
    elif "tool_calls" not in message:
        raise DataError(f"{here}: 'content' is missing. It has {keys_of(message)}.")
    learned = _learned(message, here)
    if message["role"] == "assistant" and not learned:
        message["learned"] = False
    return message


def _content(content: Any, here: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise DataError(f"{here}: 'content' must be a string, or a list of {{type: text, text}}, got {show(content)}.")
    parts = []
    for part in content:
        part = {key: value for key, value in part.items() if value is not None}
        if part.get("type", "text") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise DataError(f"{here}: 'content' has a part that is no text, {show(part)}: text alone is learned. Remove it.")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _read_calls(message: dict[str, Any], here: str) -> None:
    """Tool calls with their arguments as objects; a call in the older `function_call` becomes one of them."""
    old = message.pop("function_call", None)
    calls = message.pop("tool_calls", None) or ([old] if old is not None else [])
    calls = parse_json(calls, here, "tool_calls")
    if not isinstance(calls, list):
        raise DataError(f"{here}: 'tool_calls' must be a list, got {show(calls)}.")
    if calls and message["role"] != "assistant":
        raise DataError(f"{here}: 'tool_calls' stand in a message of the {message['role']}; only the assistant calls tools.")
    if calls:
        message["tool_calls"] = [_call(call, here) for call in calls]


def _call(call: Any, here: str) -> dict[str, Any]:
    call = parse_json(call, here, "tool_calls")
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{here}: a tool call must be {{type, function: {{name, arguments}}}}, got {show(call)}.")
    arguments = parse_json(function.get("arguments", function.get("parameters")), here, f"arguments of {function['name']}")
    if not isinstance(arguments, Mapping | None):
        raise DataError(f"{here}: the arguments of {function['name']} must be an object, got {show(arguments)}.")
    rest = {key: value for key, value in call.items() if key not in ("type", "function") and value is not None}
    rest = rest if "function" in call else {}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": dict(arguments or {})}}


def _calls_in_text(text: Any, here: str) -> list[Any]:
    if not isinstance(text, str):
        raise DataError(f"{here}: a function_call must be JSON text of {{name, arguments}}, got {show(text)}.")
    calls = parse_json(text, here, "value")
    return calls if isinstance(calls, list) else [calls]


def _learned(message: dict[str, Any], here: str) -> bool:
    """What `weight` (0 or 1, OpenAI's) and `train` say; both are taken out."""
    learned = True
    for key in ("weight", "train", "trainable"):
        value = message.pop(key, None)
        if value is None:
            continue
        if value not in (0, 1):
            raise DataError(f"{here}: '{key}' must be 0 or 1 (false or true), got {show(value)}: a message is learned or not.")
        if value and message["role"] != "assistant":
            raise DataError(f"{here}: '{key}' asks to learn a message of the {message['role']}; only the assistant's are.")
        learned = learned and bool(value)
    return learned
