"""Records to token ids and a mask of the tokens that carry loss.

A record is written as texts, each with the spans of characters that are learned; many texts reach the tokenizer in one
call. Masks are positions, never token ids: the end of a turn may be the same token as padding, and the model must learn to
write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import date
from itertools import islice
from typing import Any, NamedTuple

from losia_dist.data.forms import as_messages
from losia_dist.data.records import Records
from losia_dist.data.template import ChatTemplate, Span
from losia_dist.data.turns import TurnFinder, common_prefix
from losia_dist.errors import DataError

# The plain prompt of a tokenizer without a chat template (Stanford Alpaca's, Taori et al. 2023).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

# Records per call of the tokenizer: enough for its threads, little enough for memory.
_CHUNK = 256


class Encoded(NamedTuple):
    """One record: `ids[t]` is a token id, `learned[t]` whether the model is to predict it. Both of one length."""

    ids: list[int]
    learned: list[bool]


class Written(NamedTuple):
    """A record as text. texts: tokenized apart and laid end to end, each with the characters that are learned.

    begins: whether the record still needs the tokenizer's bos in front, ends: its eos at the end, which is learned.
    """

    texts: list[tuple[str, list[Span]]]
    begins: bool = False
    ends: bool = False


Write = Callable[[Mapping[str, Any]], Written]  # how records of one form are written down


def encode(
    records: Records, tokenizer: Any, *, chat_template: str | None = None, template_date: date | None = None
) -> Iterator[Encoded]:
    """Encode all records, in order. The first token of a record is never learned: nothing comes before it.

    chat_template: in place of the tokenizer's. template_date: what the template takes for today (None: today).

    Raises: DataError naming the record when the tokenizer or its chat template cannot serve it.
    """
    write = _writer(records, tokenizer, chat_template, template_date)
    start, eos = _start_ids(tokenizer), _eos_id(tokenizer)
    positions = iter(range(len(records)))
    while chunk := list(islice(positions, _CHUNK)):
        written = []
        for index in chunk:
            record = records[index]
            try:
                written.append(write(record))
            except DataError as error:
                raise DataError(f"{records.place(index)}: {error}") from error.__cause__
        tokens = _tokenize(tokenizer, [text for one in written for text in one.texts])
        for one in written:
            ids: list[int] = []
            learned: list[bool] = []
            for _ in one.texts:
                part, mask = next(tokens)
                ids += part
                learned += mask
            if one.begins and ids[: len(start)] != start:
                ids, learned = start + ids, [False] * len(start) + learned
            if one.ends:
                ids.append(eos)
                learned.append(True)
            if learned:
                learned[0] = False
            yield Encoded(ids, learned)


def _chat_writer(tokenizer: Any, template: ChatTemplate) -> Write:
    """Chats and instructions through the tokenizer's chat template; every assistant message is learned. See `turns`.

    Where the tokenizer joins the last characters of a prompt and the first of an answer into one token (an answer that begins
    with a newline), that token is learned. What comes back raises DataError when the template refuses the chat or leaves
    something of it out.
    """
    # Not eos alone: a base model's tokenizer may have an eos that its chat template never writes.
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    eos = tokenizer.eos_token
    finder = TurnFinder(template, [eos, *special])

    def without_eos(message: dict[str, Any]) -> dict[str, Any]:
        """An answer that brings the end that the template writes would be taught to end twice."""
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str) and _ends(content, eos):
            return {**message, "content": content.rstrip().removesuffix(eos)}
        return message

    def write(record: Mapping[str, Any]) -> Written:
        turns = finder.find(list(map(without_eos, as_messages(record))), record.get("tools"), record.get("variables"))
        return Written([(turns.text, turns.spans)], ends=not turns.ended)

    return write


def _plain(prompt: str, learned: str, eos: str) -> Written:
    """A text whose end and eos are learned, as TRL does. One that was rendered before brings bos and eos, and gets no other."""
    text = prompt + learned
    return Written([(text, [(len(prompt), len(text))])], begins=True, ends=not _ends(text, eos))


def _instruction(record: Mapping[str, Any], eos: str) -> Written:
    """An instruction for a tokenizer without a chat template: Alpaca's prompt, then the answer and eos, both learned.

    Prompt and answer are tokenized apart, so that the prompt has the same tokens in training and in generation.
    """
    for key in ("system", "history", "tools", "variables"):
        if key in record:
            name = "chat_template_kwargs" if key == "variables" else key
            raise DataError(f"'{name}' needs a chat template, and this tokenizer has none. Set tokenizer.chat_template.")
    prompt = ALPACA_WITH_INPUT if record["input"] else ALPACA_WITHOUT_INPUT
    prompt = prompt.format(instruction=record["instruction"], input=record["input"])
    answer = record["output"]
    return Written([(prompt, []), (answer, [(0, len(answer))])], begins=True, ends=not _ends(answer, eos))


def _ends(text: str, eos: str) -> bool:
    return text.rstrip().endswith(eos)


def _writer(records: Records, tokenizer: Any, chat_template: str | None, template_date: date | None) -> Write:
    _eos_id(tokenizer)
    eos = tokenizer.eos_token
    if records.form == "text":
        return lambda record: _plain("", record["text"], eos)
    if records.form == "continuation":
        return lambda record: _plain(record["prompt"], record["completion"], eos)
    if chat_template is not None or getattr(tokenizer, "chat_template", None):
        return _chat_writer(tokenizer, ChatTemplate(tokenizer, chat_template, template_date))
    if records.form == "instruction":
        return lambda record: _instruction(record, eos)
    raise DataError(
        f"{records.raw.name}: chat records need a chat template, and this tokenizer has none. Use the tokenizer of the "
        "model's instruct variant, set tokenizer.chat_template, or give instruction records."
    )


def _tokenize(tokenizer: Any, texts: list[tuple[str, list[Span]]]) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each text, and which of them hold a character that is learned."""
    # No special tokens: templates write their own. verbose=False: lengths are dealt with later, and counted.
    options = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
    found = tokenizer([text for text, _ in texts], **options)
    for at, (text, spans) in enumerate(texts):
        ids = found["input_ids"][at]
        learned = [False] * len(ids)
        if found.encodings is not None:
            ranges = [_tokens_of(span, found.encodings[at], len(ids)) for span in spans] if ids else []
        elif spans:
            ends = [text[:end] for span in spans for end in span]
            counts = [common_prefix(part, ids) for part in tokenizer(ends, **options)["input_ids"]]
            ranges = list(zip(counts[0::2], counts[1::2], strict=True))
        else:
            ranges = []
        for start, stop in ranges:
            learned[start:stop] = [True] * (stop - start)
        yield ids, learned


def _tokens_of(span: Span, encoding: Any, count: int) -> tuple[int, int]:
    """The first token that holds a character of the span, and the one after the last.

    Tokenizers leave the spaces around a token out of its range of characters (a token of spaces has an empty one), and give all
    tokens of one character the same: so a token begins where the one before it ended, or earlier.
    """
    begin, end = span
    inside = (encoding.char_to_token(at) for at in range(begin, end))
    start = next((token for token in inside if token is not None), None)
    if start is None:  # spaces alone
        start = next((token for token in range(count) if encoding.token_to_chars(token)[1] > begin), count)
    while start > 0 and encoding.token_to_chars(start - 1)[1] > begin:
        start -= 1
    inside = (encoding.char_to_token(at) for at in range(end - 1, begin - 1, -1))
    stop = next((token + 1 for token in inside if token is not None), start)
    while stop < count and min(encoding.token_to_chars(stop)[0], encoding.token_to_chars(stop - 1)[1] if stop else 0) < end:
        stop += 1
    return start, stop


def _eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so that the model cannot learn to stop. "
            "Set tokenizer.eos_token to the token that ends an answer."
        )
    return tokenizer.eos_token_id


def _start_ids(tokenizer: Any) -> list[int]:
    # Asking the tokenizer for its special tokens would also add an eos after the prompt where it is set to do so.
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
