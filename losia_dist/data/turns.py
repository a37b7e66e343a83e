"""Which characters of a rendered chat the model is to learn: what it will be asked to write, in each of its turns.

A turn is found where the template's loop writes it (see `template`). It begins where the prompt ends that asks for it, and ends
with what the template writes after the message's own text. What that is shows in a second rendering, whose messages of the
assistant hold a sentinel in place of their text: the two differ in the text alone. So nothing is guessed from tokens, and a
token that ends turns may stand inside an answer. Templates that mark `{% generation %}` are taken at their word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from losia_dist.data.messages import tool_name
from losia_dist.data.template import REASONING, SENTINEL, ChatTemplate, Rendering, Span
from losia_dist.errors import DataError

Messages = list[dict[str, Any]]

_TELLING = 16  # characters of a text that no header of a turn holds by chance


class Turns(NamedTuple):
    """A chat as written. spans: what is learned, in order. ended: whether the last turn ends as the template ends turns."""

    text: str
    spans: list[Span]
    ended: bool


class TurnFinder:
    """Writes chats with one template, and finds the assistant's turns.

    end_tokens: texts of the tokens that can end a generation. A last turn that ends in none of them is not `ended`.
    """

    def __init__(self, template: ChatTemplate, end_tokens: Sequence[str]) -> None:
        self._template = template
        self._end_tokens = tuple(end_tokens)

    def find(self, messages: Messages, tools: Sequence[Any] | None = None, variables: Mapping[str, Any] | None = None) -> Turns:
        """Write a chat of canonical messages.

        Templates differ in what they take: arguments as objects or as JSON text, no content or an empty one beside a call,
        texts or lists of parts. The first way in which everything is written counts.

        Raises: DataError when the template refuses the chat, or leaves something of it out.
        """
        self._check_read(messages, tools, variables)
        first: DataError | None = None
        for variant in _variants(messages, self._template):
            chat = _Chat(self._template, variant, tools, dict(variables or {}))
            try:
                return self._find(chat)
            except DataError as error:
                # What is left out says more than that the template failed, which has its own error as cause.
                if first is None or (first.__cause__ is not None and error.__cause__ is None):
                    first = error
        assert first is not None
        raise first

    def _check_read(self, messages: Messages, tools: Sequence[Any] | None, variables: Mapping[str, Any] | None) -> None:
        """Refuse what the template does not look at."""
        template = self._template
        if tools and not template.reads("tools", with_tools=True):
            raise DataError(
                "the record has 'tools', which the tokenizer's chat template does not write. Use a model whose template does, "
                "set tokenizer.chat_template, or write the tools into the system message."
            )
        unread = [name for name in variables or {} if not template.reads(name, bool(tools))]
        if unread:
            raise DataError(
                f"the tokenizer's chat template does not read {', '.join(map(repr, unread))} (of chat_template_kwargs or "
                "documents). Remove it from the record, or use a template that does."
            )
        if any(name in message for message in messages for name in REASONING) and not any(
            template.names(name, bool(tools)) for name in REASONING
        ):
            raise DataError(
                "a message has a reasoning of its own, which the tokenizer's chat template does not write. Put it into the "
                "content (<think>...</think>), or remove it."
            )

    def _find(self, chat: _Chat) -> Turns:
        whole = chat.whole
        _check_written(chat, tools=chat.tools)
        learned = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and chat.learned[i]]
        if self._template.marks_generation:
            spans = [span for i in learned for span in _inside(whole.generated, whole.spans.get(i, []))]
            if learned and learned[-1] == len(chat.messages) - 1:  # an end that is written after the loop
                last = max((stop for parts in whole.spans.values() for _, stop in parts), default=0)
                spans += [span for span in whole.generated if span[0] >= last]
            return Turns(whole.text, spans, ended=True)
        spans, ended = [], True
        for index in learned:
            span, ended = self._turn(chat, index)
            spans.append(span)
        return Turns(whole.text, spans, ended or not learned or learned[-1] != len(chat.messages) - 1)

    def _turn(self, chat: _Chat, index: int) -> tuple[Span, bool]:
        """What is learned of message `index`, and whether it ends in a token that ends a generation."""
        place = _place_of(chat, index)
        begin, written = place.begin, place.written
        if index == len(chat.messages) - 1:  # what the template writes after the loop ends the last turn
            written = chat.whole.text[begin:]
        head = len(place.prompt)
        if not written.startswith(place.prompt):
            # The prompt goes on otherwise (with <think>, say), so that the header ends where a plain answer would begin.
            head = common_prefix(place.prompt, _as_plain_answer(chat, index), written)
        message = chat.messages[index]
        tail = _after_plain_text(message, written[head:])
        if tail is None:
            tail = common_prefix(written[head:][::-1], place.with_sentinel()[::-1])
        end_of_turn = written[len(written) - tail :]
        answer = written[head : len(written) - tail]
        if not answer.strip() and (_text_of(message).strip() or message.get("tool_calls")):
            raise DataError(
                f"message {index}: the tokenizer's chat template leaves nothing of the answer. "
                "Change the record or the template."
            )
        answered_by = _text_of(chat.messages[index + 1]).strip() if index + 1 < len(chat.messages) else ""
        if answered_by and chat.messages[index + 1]["role"] == "tool" and answered_by in written:
            # The template writes what the tool answered into the turn that called it: what comes before is learned.
            same = common_prefix(chat.render(chat.messages[: index + 1]).of(index), written)
            return (begin + head, begin + max(head, same)), True
        # Templates often write a newline after the end of a turn. Generation has stopped by then.
        stop = begin + (len(written.rstrip()) if end_of_turn.strip() else len(written))
        ended = any(token in end_of_turn for token in self._end_tokens)
        return (begin + head, max(stop, begin + head)), ended


class _Chat:
    """One way of giving a chat to the template, and its renderings, each made when it is asked for."""

    def __init__(
        self, template: ChatTemplate, messages: Messages, tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> None:
        self.messages = [{key: value for key, value in m.items() if key != "learned"} for m in messages]
        self.learned = [m.get("learned", True) for m in messages]
        self.tools = tools
        self._template, self._variables = template, variables
        self.whole = self.render(self.messages)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> Rendering:
        return self._template.render(
            messages, tools=self.tools, variables=self._variables, add_generation_prompt=add_generation_prompt
        )

    @cached_property
    def with_sentinels(self) -> Rendering:
        return self.render(with_sentinels(self.messages))


class _Place(NamedTuple):
    """A turn: it begins at character `begin` with `written`. prompt: what asks for it; with_sentinel: it with no own text.

    The latter takes a rendering more, and is asked for where the message is more than a text that is written as it is.
    """

    begin: int
    written: str
    prompt: str
    with_sentinel: Callable[[], str]


def _place_of(chat: _Chat, index: int) -> _Place:
    whole, last = chat.whole, index == len(chat.messages) - 1
    prompted = chat.render(chat.messages[:index], add_generation_prompt=True)
    span = whole.span(index)
    if span is not None:

        def with_sentinel() -> str:
            found = chat.with_sentinels.span(index)
            return "" if found is None else chat.with_sentinels.text[found[0] : None if last else found[1]]

        prompt = _prompt_of_turn(prompted, whole, index, span)
        return _Place(span[0], whole.text[span[0] : span[1]], prompt, with_sentinel)
    # No loop writes the message: the chat up to it, and with it, must then be beginnings of the whole.
    answered = chat.render(chat.messages[: index + 1])
    begin = len(prompted.text)
    if not (whole.text.startswith(answered.text) and answered.text.startswith(prompted.text)):
        raise DataError(
            f"message {index}: the tokenizer's chat template writes it outside a loop over the messages, and otherwise when "
            "messages follow, so that the answer's place is not known. Mark answers in the template with "
            "{% generation %}, or give chats with one assistant message."
        )
    return _Place(
        begin, answered.text[begin:], "", lambda: chat.render(with_sentinels(chat.messages[: index + 1])).text[begin:]
    )


def _after_plain_text(message: Mapping[str, Any], written: str) -> int | None:
    """How many characters follow the message's text, where it is nothing else and `written` begins with it."""
    own = _text_of(message).strip()
    if not own or message.get("tool_calls") or any(name in message for name in REASONING):
        return None
    begin = len(written) - len(written.lstrip())
    return len(written) - begin - len(own) if written.startswith(own, begin) else None


def _prompt_of_turn(prompted: Rendering, whole: Rendering, index: int, span: Span) -> str:
    """What of `prompted`, the chat before message `index` with a generation prompt, follows the messages before it."""
    before = whole.text[: span[0]]
    if prompted.text.startswith(before):
        return prompted.text[len(before) :]
    # The template writes earlier messages otherwise when none follow: compare the last of them alone.
    for earlier in range(index - 1, -1, -1):
        there, here = whole.span(earlier), prompted.span(earlier)
        if there is not None and here is not None:
            text = whole.text[there[0] : there[1]]
            if prompted.text.startswith(text, here[0]):
                return prompted.text[here[0] + len(text) :]
            return prompted.text[here[1] :]
    return ""


def _check_written(chat: _Chat, tools: Sequence[Any] | None) -> None:
    """Refuse a rendering that leaves something out, which would otherwise be trained without."""
    text = chat.whole.text
    for tool in tools or []:
        if tool_name(tool) not in text:
            raise DataError(f"the tokenizer's chat template does not write the tool {tool_name(tool)!r}. Remove it.")
    for index, message in enumerate(chat.messages):
        if not _is_written(chat, index, message):
            raise DataError(
                f"message {index} ({message['role']}): the tokenizer's chat template does not write its content. Change the "
                "record (another role, or text parts in place of a text) or the template."
            )
        own = "".join(text[begin:end] for begin, end in chat.whole.spans.get(index, [])) or text
        names = [call["function"]["name"] for call in message.get("tool_calls", [])]
        arguments = [_arguments_of(call) for call in message.get("tool_calls", [])]
        lost = [name for name in names if own.count(name) < names.count(name)]
        lost += [key for each in arguments for key in each if key not in own and SENTINEL not in key]
        if lost:
            raise DataError(
                f"message {index}: the tokenizer's chat template does not write its tool calls ({lost[0]!r} is missing). Use a "
                "model whose template does, or write the call into the content."
            )


def _is_written(chat: _Chat, index: int, message: Mapping[str, Any]) -> bool:
    own = _text_of(message).strip()
    if not own:
        return True
    if message["role"] == "assistant":
        if len(own) >= _TELLING and own in chat.whole.of(index):
            return True
        seen = chat.with_sentinels.of(index) or chat.with_sentinels.text
        # Some templates drop an earlier turn's text on purpose; what they write of a last turn shows that they know it.
        return SENTINEL in seen or SENTINEL in chat.render(with_sentinels(chat.messages[: index + 1])).text
    if own in chat.whole.text:
        return True
    changed = [*chat.messages[:index], _with_sentinel(message), *chat.messages[index + 1 :]]
    return SENTINEL in chat.render(changed).text


def _variants(messages: Messages, template: ChatTemplate) -> Iterator[Messages]:
    """Ways of giving the same messages, the most common first."""
    has_calls = any(m.get("tool_calls") for m in messages)
    has_parts = any(isinstance(m.get("content"), list) for m in messages)
    without_content = any("content" not in m for m in messages)
    developer = "developer" if template.names("developer") else "system"
    base = [{**m, "role": developer} if m["role"] == "developer" else m for m in messages]
    for parts in (False, True) if has_parts else (False,):
        for empty in (False, True) if without_content else (False,):
            for as_text in (False, True) if has_calls else (False,):
                yield [_given(m, parts, empty, as_text) for m in base]


def _given(message: dict[str, Any], parts: bool, empty: bool, as_text: bool) -> dict[str, Any]:
    given = dict(message)
    if not parts and isinstance(given.get("content"), list):
        given["content"] = _text_of(message)
    if empty and "content" not in given:
        given["content"] = ""
    if as_text and given.get("tool_calls"):
        given["tool_calls"] = [
            {
                **call,
                "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
            }
            for call in given["tool_calls"]
        ]
    return given


def with_sentinels(messages: Messages) -> Messages:
    """The messages with a sentinel for each text of the assistant: contents, reasoning, names and values of calls."""
    return [_with_sentinel(m) if m["role"] == "assistant" else m for m in messages]


def _with_sentinel(message: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    for key in ("content", *REASONING):
        if isinstance(changed.get(key), str) and changed[key].strip():
            changed[key] = SENTINEL
    if isinstance(changed.get("content"), list):
        changed["content"] = [{**part, "text": SENTINEL} for part in changed["content"]]
    if changed.get("tool_calls"):
        changed["tool_calls"] = [_call_with_sentinel(call) for call in changed["tool_calls"]]
    return changed


def _call_with_sentinel(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    changed = SENTINEL if isinstance(arguments, str) else dict.fromkeys(arguments, SENTINEL)
    return {**call, "function": {"name": SENTINEL, "arguments": changed}}


def _arguments_of(call: Mapping[str, Any]) -> list[str]:
    arguments = call["function"]["arguments"]
    return list(json.loads(arguments) if isinstance(arguments, str) else arguments)


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _inside(spans: Sequence[Span], places: Sequence[Span]) -> list[Span]:
    return [span for span in spans if any(begin <= span[0] < end for begin, end in places)]


def _as_plain_answer(chat: _Chat, index: int) -> str:
    """Message `index` as it would be written if it were a text and nothing else."""
    plain = [*chat.messages[:index], {"role": "assistant", "content": SENTINEL}, *chat.messages[index + 1 :]]
    try:
        rendering = chat.render(plain)
    except DataError:  # a tool's answer follows, and no call comes before it
        rendering = chat.render(plain[: index + 1])
    return rendering.of(index)


def common_prefix(*given: Sequence[Any]) -> int:
    """With how many equal items all of them begin."""
    several = enumerate(zip(*given, strict=False))
    return next((at for at, items in several if items.count(items[0]) < len(items)), min(map(len, given)))
