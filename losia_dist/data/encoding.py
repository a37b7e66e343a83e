"""Records to token ids and a mask of the tokens that carry loss. One encoder per way of writing a record down.

An encoder splits its work so that many texts reach the tokenizer in one call: `texts(record)` gives the texts to
tokenize, `join(ids)` puts their token ids together. Masks are positions, never token ids: the end of a turn may be the
same token as padding, and the model must learn to write it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple, Protocol

from losia_dist.data.forms import as_messages
from losia_dist.data.records import Records
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


class Encoder(Protocol):
    """How records of one form are written down for one tokenizer."""

    def texts(self, record: Mapping[str, Any]) -> list[str]: ...

    def join(self, ids: list[list[int]]) -> Encoded: ...


def encode(records: Records, tokenizer: Any) -> Iterator[Encoded]:
    """Encode all records, in order. The first token of a record is never learned: nothing comes before it.

    Raises: DataError naming the record when the tokenizer or its chat template cannot serve it.
    """
    encoder = _encoder(records, tokenizer)
    positions = iter(range(len(records)))
    while chunk := list(islice(positions, _CHUNK)):
        texts = []
        for index in chunk:
            record = records[index]
            try:
                texts.append(encoder.texts(record))
            except DataError as error:
                raise DataError(f"{records.place(index)}: {error}") from error.__cause__
        flat = iter(_ids(tokenizer, [text for group in texts for text in group]))
        for group in texts:
            encoded = encoder.join([next(flat) for _ in group])
            if encoded.learned:
                encoded.learned[0] = False
            yield encoded


class ChatEncoder:
    """Chats and instructions through the tokenizer's chat template; every assistant message is learned.

    An assistant message's tokens are those that `messages[:i + 1]` renders beyond `messages[:i]` with a generation
    prompt: exactly what the model will be asked to write. This needs no `{% generation %}` in the template, but it
    needs renderings to be prefixes of each other, which is checked. Where the tokenizer joins the last characters of
    a prompt and the first of an answer into one token (an answer that begins with a newline), that token is learned.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_id = _eos_id(tokenizer)
        # Not eos alone: a base model's tokenizer may have an eos that its chat template never writes.
        added = tokenizer.added_tokens_decoder
        self.end_ids = {self.eos_id, *(token_id for token_id, token in added.items() if token.special)}

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """For each assistant message its prompt and the chat up to its end; then the whole chat, if it goes on.

        Each text is a prefix of the next. Raises: DataError when the template refuses the chat or rewrites it.
        """
        messages = as_messages(record)
        texts: list[str] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                texts.append(self._render(messages[:index], add_generation_prompt=True))
                texts.append(self._render(messages[: index + 1]))
        if messages[-1]["role"] != "assistant":
            texts.append(self._render(messages))
        if not all(longer.startswith(shorter) for shorter, longer in pairwise(texts)):
            raise DataError(
                "the tokenizer's chat template is not prefix-stable: what it writes for a chat changes when the next "
                "message is added, so that the answers' tokens cannot be told apart. Use a chat template that leaves "
                "earlier messages as they are (set tokenizer.chat_template), or give chats with one assistant message."
            )
        return texts

    def join(self, ids: list[list[int]]) -> Encoded:
        whole = list(ids[-1])
        learned = [False] * len(whole)
        for prompt, answered in zip(ids[0::2], ids[1::2], strict=False):
            start, stop = _common_prefix(prompt, whole), _common_prefix(answered, whole)
            end = self._end_of_turn(whole, start, stop)
            if end is None and stop == len(whole):  # the template writes no end of turn: end the chat with one
                whole.append(self.eos_id)
                learned.append(False)
                stop += 1
            for position in range(start, end or stop):
                learned[position] = True
        return Encoded(whole, learned)

    def _end_of_turn(self, ids: Sequence[int], start: int, stop: int) -> int | None:
        # Templates often write a newline after the end of a turn. Generation has stopped by then, so that learning
        # it would be of no use.
        return next((at + 1 for at in range(stop - 1, start - 1, -1) if ids[at] in self.end_ids), None)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # templates refuse chats with errors of their own (roles must alternate, ...)
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the tokenizer's chat template refuses this chat (roles: {roles}): {error}. Change the record or the template."
            ) from error


class PlainInstructionEncoder:
    """Instructions for a tokenizer without a chat template: Alpaca's prompt, then the answer and eos, both learned.

    Prompt and answer are tokenized apart, so that the prompt has the same tokens in training and in generation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.eos_id = _eos_id(tokenizer)
        self.start = _start_ids(tokenizer)

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        prompt = ALPACA_WITH_INPUT if record["input"] else ALPACA_WITHOUT_INPUT
        return [prompt.format(instruction=record["instruction"], input=record["input"]), record["output"]]

    def join(self, ids: list[list[int]]) -> Encoded:
        prompt, answer = ids
        prompt, answer = self.start + prompt, [*answer, self.eos_id]
        return Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))


class TextEncoder:
    """Plain text and eos; all of it is learned."""

    def __init__(self, tokenizer: Any) -> None:
        self.eos_id = _eos_id(tokenizer)
        self.start = _start_ids(tokenizer)

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        return [record["text"]]

    def join(self, ids: list[list[int]]) -> Encoded:
        whole = [*self.start, *ids[0], self.eos_id]
        return Encoded(whole, [True] * len(whole))


def _encoder(records: Records, tokenizer: Any) -> Encoder:
    if records.form == "text":
        return TextEncoder(tokenizer)
    if getattr(tokenizer, "chat_template", None):
        return ChatEncoder(tokenizer)
    if records.form == "instruction":
        return PlainInstructionEncoder(tokenizer)
    raise DataError(
        f"{records.raw.name}: chat records need a chat template, and this tokenizer has none. Use the tokenizer of the "
        "model's instruct variant, set tokenizer.chat_template, or give instruction records."
    )


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # No special tokens: templates write their own. verbose=False: lengths are dealt with later, and counted.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
