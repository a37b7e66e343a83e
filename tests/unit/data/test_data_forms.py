"""Every form that people have their records in: what the model reads and learns of it, or why it is refused."""

import json

import pytest

from losia_dist.data import build_dataset, load_records
from losia_dist.errors import DataError
from tests.unit.data.test_data_encoding import CHATML, learned_texts, make_tokenizer, whole_text

# ChatML with tools, calls and variables, as Qwen writes them.
TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% if mood %}[{{ mood }}]{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['reasoning_content'] }}{{ m['content'] }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"
ASK, SAY = {"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Say"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = '<call>weather {"city": "Oslo"}</call>' + END


def called(**changes):
    """A chat that ends in a tool call, with other keys in the calling message."""
    return {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL], **changes}]}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


# record -> what is learned, and what stands in the whole
FORMS = {
    "messages": ({"messages": [ASK, SAY]}, ["Say" + END], "user\nAsk"),
    "messages as JSON text": ({"messages": json.dumps([ASK, SAY])}, ["Say" + END], "user\nAsk"),
    "developer": ({"messages": [{"role": "developer", "content": "Brief"}, ASK, SAY]}, ["Say" + END], "system\nBrief"),
    "system beside messages": ({"messages": [ASK, SAY], "system": "Brief"}, ["Say" + END], "system\nBrief"),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "As"}, {"type": "text", "text": "k"}]}, SAY]},
        ["Say" + END],
        "user\nAsk" + END,
    ),
    "tools": ({**called(content=""), "tools": [TOOL]}, [CALLED], "Of a city"),
    "tools as JSON text": ({**called(content=""), "tools": json.dumps([TOOL])}, [CALLED], "Of a city"),
    "each tool as JSON text": ({**called(content=""), "tools": [json.dumps(TOOL)]}, [CALLED], "Of a city"),
    "older functions": ({**called(content=""), "functions": [TOOL["function"]]}, [CALLED], "Of a city"),
    "call, content null": (called(content=None), [CALLED], "Ask"),
    "call, content absent": (called(), [CALLED], "Ask"),
    "call, arguments as JSON text": (
        called(tool_calls=[{**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]),
        [CALLED],
        "Ask",
    ),
    "call, older function_call": (
        called(tool_calls=None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
        [CALLED],
        "Ask",
    ),
    "answer of a tool": (
        {"messages": [*called()["messages"], {"role": "function", "name": "weather", "content": "rain"}, SAY]},
        [CALLED, "Say" + END],
        "tool\nrain",
    ),
    "weight": ({"messages": [ASK, {**SAY, "content": "BAD", "weight": 0}, ASK, {**SAY, "weight": 1}]}, ["Say" + END], "BAD"),
    "train": ({"messages": [ASK, {**SAY, "content": "BAD", "train": False}, ASK, SAY]}, ["Say" + END], "BAD"),
    "reasoning": ({"messages": [ASK, {**SAY, "reasoning": "Hm. "}]}, ["Hm. Say" + END], "Ask"),
    "variables": ({"messages": [ASK, SAY], "chat_template_kwargs": {"mood": "glad"}}, ["Say" + END], "[glad]"),
    "ShareGPT": (sharegpt(("system", "Brief"), ("human", "Ask"), ("gpt", "Say")), ["Say" + END], "system\nBrief"),
    "ShareGPT with a call": (
        sharegpt(
            ("human", "Ask"),
            ("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
            ("observation", "rain"),
            ("gpt", "Say"),
            system="Brief",
            tools=json.dumps([TOOL["function"]]),
        ),
        [CALLED, "Say" + END],
        "tool\nrain",
    ),
    "Alpaca": ({"instruction": "Ask", "input": "this", "output": "Say"}, ["Say" + END], "user\nAsk\n\nthis"),
    "Alpaca with system and history": (
        {"instruction": "Ask", "input": "", "output": "Say", "system": "Brief", "history": [["Who?", "Me."]]},
        ["Me." + END, "Say" + END],
        "system\nBrief<|im_end|>\n<|im_start|>user\nWho?",
    ),
    "TRL, messages": ({"prompt": [ASK, SAY, ASK], "completion": [{**SAY, "content": "Last"}]}, ["Last" + END], "Say"),
    "TRL, texts": ({"prompt": "Ask", "completion": " Say"}, [" Say" + END], "Ask Say"),
    "text": ({"text": "Ask Say"}, ["k Say" + END], "Ask Say"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TOOLS_TEMPLATE)


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_what_is_learned_of_a_form(tmp_path, tokenizer, form):
    row, learned, whole = FORMS[form]
    example = build_dataset(load_records(write(tmp_path, row)), tokenizer, 400)[0]
    found = learned_texts(tokenizer, example)
    assert found == learned if form != "text" else found[0].endswith("Say" + END)
    assert whole in whole_text(tokenizer, example) and "None" not in whole_text(tokenizer, example)


def test_other_names_are_given_as_columns(tmp_path, tokenizer):
    path = write(tmp_path, {"question": "Ask", "answer": "Say", "id": 3})
    records = load_records(path, columns={"question": "instruction", "answer": "output"})
    assert learned_texts(tokenizer, build_dataset(records, tokenizer, 400)[0]) == ["Say" + END]
    assert records.unused == {"id"}
    with pytest.raises(DataError, match=r"data.jsonl, line 1: no 'reply', which is to be read as 'output'. It has 'question'"):
        load_records(path, columns={"question": "instruction", "reply": "output"})


REFUSED = {
    "preferences": ({"prompt": "Ask", "completion": "Say", "rejected": "No"}, "'rejected' has no place .* TRL's trainers"),
    "tools beside a text": ({"text": "Say", "tools": [TOOL]}, "'tools' has no place in a record of the form 'text'"),
    "system beside a continuation": ({"prompt": "Ask", "completion": "Say", "system": "Brief"}, "'system' has no place"),
    "tokens": ({"text": "Say", "labels": [1, 2]}, "'labels' has no place .*: give text"),
    "images": ({"messages": [ASK, SAY], "images": ["a.png"]}, "'images' has no place .*: text alone"),
    "an image part": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAY]},
        "message 0: .* a part that is no text",
    ),
    "a weight between": ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "message 1: 'weight' must be 0 or 1"),
    "a question to learn": (
        {"messages": [{**ASK, "weight": 1}, SAY]},
        "message 0: 'weight' asks to learn a message of the user",
    ),
    "two systems": ({"messages": [{"role": "system", "content": "A"}, ASK, SAY], "system": "B"}, "'system' stands beside"),
    "arguments that are no JSON": (
        called(tool_calls=[{"function": {"name": "weather", "arguments": "{city"}}]),
        "message 1: 'arguments of weather' is no JSON",
    ),
    "a call of the user": (
        {"messages": [{**ASK, "tool_calls": [CALL]}, SAY]},
        "message 0: 'tool_calls' stand in a message of the user",
    ),
    "tools that are no list": ({"messages": [ASK, SAY], "tools": '{"a": 1}'}, "'tools' must be a list"),
    "a refusal": ({"messages": [ASK, {**SAY, "refusal": "No"}]}, "message 1: 'refusal' cannot be used"),
    "history of no pairs": ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' must be a list of"),
    "half a character": (
        {"messages": [ASK, {**SAY, "content": "\ud83d"}]},
        r"'messages\[1\].content' holds half of a character",
    ),
    "half a character in a tool": ({"messages": [ASK, SAY], "tools": [{"name": "\udc00"}]}, r"'tools\[0\].name' holds half"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_learned_wrongly_is_refused_with_its_line(tmp_path, case):
    row, words = REFUSED[case]
    good = (
        {"text": "a"} if "text" in row else {"prompt": "a", "completion": "b"} if "prompt" in row else {"messages": [ASK, SAY]}
    )
    if "instruction" in row:
        good = {"instruction": "a", "output": "b"}
    with pytest.raises(DataError, match=r"data.jsonl, line 2.*" + words):
        load_records(write(tmp_path, good, row))


NOT_WRITTEN = {
    "tools": ({"messages": [ASK, SAY], "tools": [TOOL]}, CHATML, "'tools', which the tokenizer's chat template does not write"),
    "a call": (called(content=""), CHATML, r"message 1: .* does not write its tool calls \('weather' is missing\)"),
    "a second call": (
        called(tool_calls=[CALL, {**CALL, "function": {"name": "time", "arguments": {}}}]),
        CHATML.replace("{{ m['content'] }}", "{{ m.content }}{{ m.tool_calls[0].function if m.tool_calls }}"),
        r"does not write its tool calls \('time' is missing\)",
    ),
    "an argument": (
        called(),
        CHATML.replace("{{ m['content'] }}", "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}"),
        r"does not write its tool calls \('city' is missing\)",
    ),
    "a variable": ({"messages": [ASK, SAY], "chat_template_kwargs": {"mood": 1}}, CHATML, "does not read 'mood'"),
    "reasoning": (
        {"messages": [ASK, {**SAY, "reasoning_content": "Hm"}]},
        CHATML,
        "a reasoning of its own, which .* not write",
    ),
    "a system message": (
        {"messages": [{"role": "system", "content": "Brief"}, ASK, SAY]},
        CHATML.replace("in messages", "in messages if m.role != 'system'"),
        r"message 0 \(system\): .* does not write its content",
    ),
    "texts": (
        {"messages": [ASK, SAY]},
        CHATML.replace("{{ m['content'] }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"),
        r"message 0 \(user\): .* does not write its content.*text parts",
    ),
    "what follows a thought": (
        {"messages": [ASK, {**SAY, "content": "<think>Hm</think>"}]},
        CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
        "message 1: .* leaves nothing of the answer",
    ),
    "system of an instruction, without a template": (
        {"instruction": "Ask", "output": "Say", "system": "Brief"},
        None,
        "'system' needs a chat template",
    ),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_a_template_does_not_write_is_refused_with_its_line(tmp_path, case):
    row, template, words = NOT_WRITTEN[case]
    good = row if case.endswith("without a template") and row.pop("none", None) else {"messages": [ASK, SAY]}
    rows = [good, row] if template is not None and case != "texts" else [row]
    with pytest.raises(DataError, match=rf"data.jsonl, line {len(rows)}: .*{words}"):
        build_dataset(load_records(write(tmp_path, *rows)), make_tokenizer(template), 400)


def test_parts_reach_a_template_that_wants_them(tmp_path):
    tokenizer = make_tokenizer(CHATML.replace("{{ m['content'] }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"))
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in (ASK, SAY)]
    example = build_dataset(load_records(write(tmp_path, {"messages": parts})), tokenizer, 400)[0]
    assert learned_texts(tokenizer, example) == ["Say" + END]
