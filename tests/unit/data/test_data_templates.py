"""Stock chat templates: the assistant's turns are learned, all of them and nothing else, as the template writes them."""

import json
from datetime import date
from pathlib import Path

import pytest

from losia_dist.data import build_dataset, load_records, template_reads_date, training_template
from losia_dist.data.template import ChatTemplate
from losia_dist.data.turns import TurnFinder
from losia_dist.errors import ConfigError, DataError
from tests.unit.data.test_data_encoding import CHAT, CHATML, learned_texts, make_tokenizer, whole_text

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def source(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "BRIEF"}
TURNS = [user("QUESTION"), says("First answer."), user("QUESTION"), says("Second <answer>.")]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "D", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}
CALLING = [
    SYSTEM,
    user("QUESTION"),
    CALL,
    {"role": "tool", "name": "weather", "content": "RAIN"},
    says("It rains."),
    *TURNS[2:],
]

# What a template does not take of CALLING (Gemma's first template takes no system message either).
NO_TOOLS = ["cohere", "cohere2", "deepseek_r1_distill", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5_vl"]
TOOLS = [
    *("gemma4", "glm4moe", "gptoss", "lfm2_v2", "llama3_1", "llama3_2", "nemotron_3_nano", "nemotron_3_super", "qwen2_5"),
    *("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<s>")


def learned(tokenizer, template, messages, tools=None):
    turns = TurnFinder(ChatTemplate(tokenizer, template), [tokenizer.eos_token]).find(messages, tools)
    return [turns.text[begin:end] for begin, end in turns.spans]


@pytest.mark.parametrize("name", [*NO_TOOLS, *TOOLS, "gemma"])
def test_two_turns_under_a_stock_template(tokenizer, name):
    messages = TURNS if name == "gemma" else [SYSTEM, *TURNS]
    first, second = learned(tokenizer, source(name), messages)
    assert "First answer." in first and "Second <answer>." in second
    assert not any(word in first + second for word in ("QUESTION", "BRIEF", "user\n", "system"))


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_call_under_a_stock_template(tokenizer, name):
    call, *answers = learned(tokenizer, source(name), CALLING, [TOOL])
    assert "weather" in call and "Oslo" in call and len(answers) == 2
    assert call.count("<tool_call>") == call.count("</tool_call>")
    assert all(text in found for text, found in zip(("It rains.", "Second <answer>."), answers, strict=True))
    assert not any(word in "".join([call, *answers]) for word in ("QUESTION", "BRIEF", "RAIN"))


# The same as TRL's masks but for the generation prompt, which TRL counts to the answer for some templates, white space around a
# turn, and an empty thought, which TRL's training templates write into every turn and the stock ones into some.
WITH_PROMPT = {"deepseek_r1_distill": "<\uff5cAssistant\uff5c>", "gptoss": "<|start|>assistant"}
EMPTY_THOUGHTS = ("<think>\n\n</think>", "<think></think>", "</think>", "<think>")


def bare(texts, name):
    whole = "".join(text.strip().removeprefix(WITH_PROMPT.get(name, "")) for text in texts)
    for thought in EMPTY_THOUGHTS:
        whole = whole.replace(thought, "")
    return "".join(whole.split())


@pytest.mark.parametrize("name", [n for n in [*NO_TOOLS, *TOOLS, "gemma"] if (TEMPLATES / f"{n}_training.jinja").is_file()])
def test_the_same_is_learned_as_under_trls_training_template(tokenizer, name):
    """TRL marks the end of GLM's turns by the header of the next; here eos ends the last one."""
    messages = TURNS if name == "gemma" else CALLING if name in TOOLS else [SYSTEM, *TURNS]
    tools = [TOOL] if messages is CALLING else None
    ours, theirs = (bare(learned(tokenizer, source(n), messages, tools), name) for n in (name, f"{name}_training"))
    if name == "glm4moe":
        theirs = theirs.replace("<|observation|>", "").replace("<|user|>", "")
    assert ours == theirs


def test_masks_equal_those_that_transformers_gives_for_marked_templates(tmp_path):
    tokenizer = make_tokenizer(source("qwen2_5_training"))
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [SYSTEM, *TURNS]}) + "\n")
    example = build_dataset(load_records(path), tokenizer, 1000)[0]
    expected = tokenizer.apply_chat_template([SYSTEM, *TURNS], return_dict=True, return_assistant_tokens_mask=True)
    assert example["input_ids"].tolist() == expected["input_ids"]
    assert (example["labels"] != -100).int().tolist() == expected["assistant_masks"]


def test_weights_count_under_marked_templates_too(tokenizer):
    messages = [TURNS[0], {**TURNS[1], "learned": False}, *TURNS[2:]]
    assert learned(tokenizer, source("qwen2_5_training"), messages) == ["\nSecond <answer>.<|im_end|>\n"]
    assert learned(tokenizer, CHATML, messages) == ["Second <answer>.<|im_end|>"]


def test_what_is_written_is_what_transformers_writes(tokenizer):
    for name in [*NO_TOOLS, *TOOLS]:
        ours = ChatTemplate(tokenizer, source(name)).render([SYSTEM, *TURNS]).text
        assert ours == tokenizer.apply_chat_template([SYSTEM, *TURNS], tokenize=False, chat_template=source(name)), name


def test_equal_messages_are_told_apart_and_later_ones_may_change_earlier_ones(tokenizer):
    same = [user("Hi"), says("Hi"), user("Hi"), says("Hi"), user("Hi")]
    assert learned(tokenizer, CHATML, same) == ["Hi<|im_end|>", "Hi<|im_end|>"]
    thinking = [user("QUESTION"), says("<think>\nhm\n</think>\n\nA"), user("QUESTION"), says("<think>\nso\n</think>\n\nB")]
    found = learned(tokenizer, source("qwen3"), thinking)
    assert found == ["A<|im_end|>", "<think>\nso\n</think>\n\nB<|im_end|>"]


NUMBERED = (
    "{% for i in range(messages | length) %}{% set m = messages[i] %}{% set before = messages[i - 1] %}"
    + CHATML.split("%}", 1)[1]
)
PROMPT_IN_LOOP = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<e>\n{% if loop.last and add_generation_prompt %}<assistant>\n"
    "{% endif %}{% endfor %}"
)
IN_A_MACRO = (
    "{% macro one(m) %}<{{ m.role }}>{{ m.content | trim }}<e>{% endmacro %}{% set text %}{% for m in messages %}{{ one(m) }}"
    "{% endfor %}{% endset %}{{ text }}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LOOKS_AHEAD = (
    "{% for m in messages %}{% for other in messages[loop.index:] %}{% if other.role == 'tool' %}!{% endif %}{% endfor %}"
    "<{{ m.role }}>{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SKIPS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% continue %}{% endif %}<{{ m.role }}>{{ m.content }}<e>"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_LOOP = (
    "<user>{{ messages[0].content }}<e>{% if messages | length > 1 %}<assistant>{{ messages[1].content }}<e>"
    "{% elif add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [NUMBERED, PROMPT_IN_LOOP, IN_A_MACRO, LOOKS_AHEAD, SKIPS], ids=range(5))
def test_loops_of_every_kind(tokenizer, template):
    first, second = learned(tokenizer, template, [SYSTEM, *TURNS])
    end = "<|im_end|>" if template is NUMBERED else "<e>"
    assert (first, second) == (f"First answer.{end}", f"Second <answer>.{end}")


def test_a_template_without_a_loop_is_learned_where_its_text_only_grows(tokenizer):
    assert learned(tokenizer, NO_LOOP, TURNS[:2]) == ["First answer.<e>"]
    with pytest.raises(DataError, match="message 3: .* leaves nothing of the answer"):
        learned(tokenizer, NO_LOOP, TURNS)
    with pytest.raises(DataError, match="message 1: .* outside a loop .*generation"):
        learned(tokenizer, NO_LOOP.replace("<user>", "<{{ messages | length }}>"), TURNS[:2])


@pytest.mark.parametrize("text", ["a\ufdd01\ufdd1b", "\ufdd1", "\ufdd2"])
def test_characters_that_stand_for_places_cannot_be_forged(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [user(text), says("A")]}) + "\n")
    with pytest.raises(DataError, match=r"data.jsonl, line 1: 'messages\[0\].content' holds U\+FDD\d, which is no character"):
        load_records(path)


def test_templates_stay_in_the_sandbox(tokenizer):
    for attack in ("{{ messages.append(1) }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__bases__ }}"):
        with pytest.raises(DataError, match="refuses this chat"):
            learned(tokenizer, attack + CHATML, TURNS)
    with pytest.raises(ConfigError, match="no Jinja template"):
        ChatTemplate(tokenizer, "{% for %}").render(TURNS)


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_a_template_writes_the_day_that_it_is_given(tmp_path, name):
    tokenizer = make_tokenizer(source(name))
    assert template_reads_date(tokenizer) and not template_reads_date(tokenizer, CHATML)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    text = whole_text(tokenizer, build_dataset(load_records(path), tokenizer, 1000, template_date=date(2021, 2, 3))[0])
    assert "03 Feb 2021" in text or "2021-02-03" in text


def test_trls_training_template_is_used_where_it_is_asked_for(tmp_path):
    tokenizer = make_tokenizer(source("qwen3"))
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    dataset = build_dataset(load_records(path), tokenizer, 1000, chat_template=training_template(tokenizer))
    assert learned_texts(tokenizer, dataset[0])[0] == "<think>\n\n</think>\n\nRed.<|im_end|>\n"
    with pytest.raises(ConfigError, match="--chat_template trl: TRL has none for this tokenizer's template"):
        training_template(make_tokenizer(CHATML))
