"""`ChatTemplate`: a tokenizer's chat template that also says which characters of its output stand for which message.

A template writes a chat in a loop over its messages. The loop is marked in the template's syntax tree, after parsing, so that
no whitespace changes: each turn of the loop first writes which message it is about, and the end of the loop writes that it
ended. The marks are taken out of the output again. This asks nothing of the template: later messages may change how it
writes earlier ones, and no token has to be known as the end of a turn. `{% generation %}` blocks are marked in the same way.

Environment, sandbox and filters are those that Transformers renders with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes

from losia_dist.errors import ConfigError, DataError

# By the Unicode standard these are no characters: no text that is interchanged has them. `forms` refuses records that do.
NOT_CHARACTERS = _OPEN, _CLOSE, SENTINEL = "\ufdd0", "\ufdd1", "\ufdd2"
_MARK = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")
REASONING = ("reasoning_content", "thinking", "reasoning")  # the keys under which a message has one
_LOOP, _SET = "__losia_loop", "__losia_set"
_END, _GENERATED, _REST = "end", "generated", "rest"

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass
class Rendering:
    """A chat as written. spans[i]: where message i stands; it has none where no loop writes it. generated: marked blocks."""

    text: str
    spans: dict[int, list[Span]] = field(default_factory=dict)
    generated: list[Span] = field(default_factory=list)

    def span(self, index: int) -> Span | None:
        """Where message `index` stands, if that is one place."""
        found = self.spans.get(index, [])
        return found[0] if len(found) == 1 else None

    def of(self, index: int) -> str:
        """What is written of message `index`; nothing where that is not one place."""
        span = self.span(index)
        return "" if span is None else self.text[slice(*span)]


class ChatTemplate:
    """The chat template of `tokenizer`, or `source` in its place.

    day: what the template takes for today; None is the day on which it renders.

    Raises: ConfigError for a template that is no Jinja.
    """

    def __init__(self, tokenizer: Any, source: str | None = None, day: date | None = None) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._day = day

    def reads(self, name: str, with_tools: bool = False) -> bool:
        """Whether the template looks at the variable `name`."""
        return name in self._choose(with_tools).variables

    def names(self, word: str, with_tools: bool = False) -> bool:
        """Whether the template has `word` as a string, a key or an attribute."""
        return word in self._choose(with_tools).words

    @property
    def marks_generation(self) -> bool:
        """Whether it says itself what is to be learned, in `{% generation %}` blocks."""
        return self._choose(False).marks_generation

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """Write a chat. Values must be plain JSON types: templates come from elsewhere, and what they get can be called.

        Raises: DataError when the template refuses the chat.
        """
        compiled = self._choose(bool(tools))
        own = [_with_all_names_of_reasoning(message) for message in messages]
        tracker = _Tracker(own)
        given: dict[str, Any] = {**self._tokenizer.special_tokens_map, **(variables or {})}
        if self._day is not None:
            given["strftime_now"] = datetime.combine(self._day, time()).strftime
        try:
            text = compiled.template.render(
                messages=own,
                tools=list(tools) if tools else None,
                documents=given.pop("documents", None),
                add_generation_prompt=add_generation_prompt,
                **given,
                **{_LOOP: tracker.loop, _SET: tracker.assigned},
            )
        except Exception as error:  # templates refuse chats with errors of their own (roles must alternate, ...)
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"the tokenizer's chat template refuses this chat (roles: {roles}): {error}. Change the record or the template."
            ) from error
        return _take_marks_out(text)

    def _choose(self, with_tools: bool) -> _Compiled:
        source = self._source
        if source is None:
            try:
                source = self._tokenizer.get_chat_template(tools=[{}] if with_tools else None)
            except ValueError as error:  # several templates with names, and none of them for this
                raise ConfigError(f"the tokenizer has no chat template for this: {error}") from error
        return _compile(source)


def template_reads_date(tokenizer: Any, source: str | None = None) -> bool:
    """Whether the chat template of `tokenizer`, or `source`, writes the day on which it renders."""
    if source is None and not getattr(tokenizer, "chat_template", None):
        return False
    template = ChatTemplate(tokenizer, source)
    return template.reads("strftime_now") or template.reads("strftime_now", with_tools=True)


def training_template(tokenizer: Any) -> str:
    """The training template that TRL ships for this tokenizer's stock template.

    Raises: ConfigError when TRL is not installed, or has none.
    """
    try:
        from trl.chat_template_utils import get_training_chat_template

        found = get_training_chat_template(tokenizer)
    except ImportError as error:
        raise ConfigError(
            f"--chat_template trl needs TRL, which cannot be imported ({error}): pip install trl, or leave it out."
        ) from error
    except ValueError as error:
        raise ConfigError(f"--chat_template trl: TRL has none for this tokenizer's template ({error}). Leave it out.") from None
    return found if found is not None else tokenizer.get_chat_template()


@dataclass(frozen=True)
class _Compiled:
    template: Template
    variables: frozenset[str]
    words: frozenset[str]
    marks_generation: bool


@cache
def _compile(source: str) -> _Compiled:
    # Private, and the only way to the very environment that Transformers renders with; `apply_chat_template` hides the output's
    # characters behind tokens.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(source).environment
        tree = environment.parse(source)
    except TemplateError as error:
        raise ConfigError(f"the chat template is no Jinja template: {error}. Set tokenizer.chat_template to one.") from error
    names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    variables = frozenset(meta.find_undeclared_variables(tree) | (names & environment.globals.keys()))
    words = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    words |= {node.attr for node in tree.find_all(nodes.Getattr)}
    marks_generation = _mark_generation(tree)
    _mark_loops(tree)
    template = Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    return _Compiled(template, variables, frozenset(words), marks_generation)


def _mark_loops(tree: nodes.Node) -> None:
    numbers = {loop: number for number, loop in enumerate(tree.find_all(nodes.For))}
    for loop, number in numbers.items():
        targets = [loop.target] if isinstance(loop.target, nodes.Name) else list(loop.target.find_all(nodes.Name))
        loop.body.insert(0, _call(_LOOP, number, *(target.name for target in targets)))
        _mark_assignments(loop.body, number)
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for name in parent.fields:
            children = getattr(parent, name, None)
            if isinstance(children, list):
                for at in range(len(children) - 1, -1, -1):
                    if isinstance(children[at], nodes.For):
                        children.insert(at + 1, _call(_LOOP, numbers[children[at]]))


def _mark_assignments(body: list[nodes.Node], loop: int) -> None:
    """After `{% set message = messages[i] %}` in a loop over numbers: this turn is about that message."""
    for at in range(len(body) - 1, -1, -1):
        statement = body[at]
        if isinstance(statement, nodes.Assign) and isinstance(statement.target, nodes.Name):
            body.insert(at + 1, _call(_SET, loop, statement.target.name))
        elif isinstance(statement, nodes.If):
            for branch in (statement.body, statement.else_, *(other.body for other in statement.elif_)):
                _mark_assignments(branch, loop)


def _call(function: str, loop: int, *names: str) -> nodes.Output:
    arguments: list[nodes.Expr] = [nodes.Const(loop), *(nodes.Name(name, "load") for name in names)]
    call = nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)
    output = nodes.Output([call])
    output.set_lineno(1)
    return output


def _mark_generation(tree: nodes.Node) -> bool:
    found = False
    for block in tree.find_all(nodes.CallBlock):
        if isinstance(block.call.node, nodes.ExtensionAttribute) and block.call.node.name == "_generation_support":
            found = True
            for position, kind in ((0, _GENERATED), (len(block.body) + 1, _REST)):
                mark = nodes.Output([nodes.Const(f"{_OPEN}{kind}{_CLOSE}")])
                mark.set_lineno(1)
                block.body.insert(position, mark)
    return found


class _Tracker:
    """Says, in the output, which message a turn of a loop is about. Messages are told by identity: equal ones may repeat."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._index = {id(message): index for index, message in enumerate(messages)}
        self._active: int | None = None  # the loop that writes messages; loops inside it may look at messages too
        self._unknown: set[int] = set()  # loops whose present turn is about no message yet

    def loop(self, loop: int, *targets: Any) -> str:
        """A turn of a loop begins, or, without targets, the loop has ended."""
        if self._active not in (None, loop):
            return ""
        index = next((self._index[id(target)] for target in targets if id(target) in self._index), None)
        if index is not None:
            self._active = loop
            self._unknown.discard(loop)
            return f"{_OPEN}{index}{_CLOSE}"
        if targets:
            self._unknown.add(loop)
        ended, self._active = self._active == loop, None
        return f"{_OPEN}{_END}{_CLOSE}" if ended else ""

    def assigned(self, loop: int, value: Any) -> str:
        """A variable was set inside a loop."""
        return self.loop(loop, value) if loop in self._unknown and id(value) in self._index else ""


def _take_marks_out(marked: str) -> Rendering:
    pieces = _MARK.split(marked)
    rendering = Rendering("".join(pieces[0::2]))
    at = len(pieces[0])
    begun: tuple[int, int] | None = None  # message, position
    generating = 0

    def close() -> None:
        if begun is not None and at > begun[1]:
            rendering.spans.setdefault(begun[0], []).append((begun[1], at))

    for mark, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if mark == _GENERATED:
            generating = at
        elif mark == _REST:
            if at > generating:
                rendering.generated.append((generating, at))
        else:
            close()
            begun = None if mark == _END else (int(mark), at)
        at += len(text)
    close()
    return rendering


def _with_all_names_of_reasoning(message: Message) -> dict[str, Any]:
    """As Transformers gives it to templates, which read it under one of two names."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
