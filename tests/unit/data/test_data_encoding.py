"""From records to tokens: which tokens carry loss, what happens to long records, and what the report says."""

import json
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from losia_dist.data import build_dataset, load_records
from losia_dist.data.encoding import _tokens_of
from losia_dist.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2 and Mistral: no role markers for the assistant, who ends with eos; refuses a system message.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# As templates that drop the reasoning of earlier turns.
REWRITES_HISTORY = CHATML.replace("{{ m['content'] }}", "{% if loop.last %}thought {% endif %}{{ m['content'] }}")
NO_END_OF_TURN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

CHAT = {
    "messages": [
        {"role": "user", "content": "Name a color."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another color."},
        {"role": "assistant", "content": "Blue."},
    ]
}
INSTRUCTION = {"instruction": "Add the numbers.", "input": "1 2", "output": "The sum is 3."}


def make_tokenizer(chat_template=CHATML, eos="<|im_end|>", **special):
    """Byte-level BPE, so that text survives the round trip; pad is eos, as in many published models."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["Name a color. Red. Blue. Add the numbers. The sum is 3.", "user assistant system"], trainer)
    extra = ["<|im_start|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=eos, additional_special_tokens=extra, **special
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def records(tmp_path):
    def load(*rows, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_records(path, **options)

    return load


def whole_text(tokenizer, example):
    return tokenizer.decode(example["input_ids"])


def learned_texts(tokenizer, example):
    """The runs of tokens that carry loss, decoded."""
    runs, run = [], []
    for token, label in zip(example["input_ids"].tolist() + [0], example["labels"].tolist() + [-100], strict=True):
        assert label in (token, -100)
        if label != -100:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_every_assistant_message_is_learned_up_to_its_end_of_turn(records):
    tokenizer = make_tokenizer()
    example = build_dataset(records(CHAT), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == ["Red.<|im_end|>", "Blue.<|im_end|>"]
    assert whole_text(tokenizer, example) == tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)


def test_an_end_of_turn_that_is_not_eos_ends_the_answer(records):
    tokenizer = make_tokenizer(eos="<s>")  # as the tokenizers of base models that carry a chat template
    example = build_dataset(records(CHAT), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == ["Red.<|im_end|>", "Blue.<|im_end|>"]
    assert whole_text(tokenizer, example).endswith("Blue.<|im_end|>\n")


def test_a_message_after_the_last_answer_is_read_but_not_learned(records):
    tokenizer = make_tokenizer()
    example = build_dataset(records({"messages": CHAT["messages"][:3]}), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == ["Red.<|im_end|>"]
    assert whole_text(tokenizer, example).endswith("Another color.<|im_end|>\n")


def test_templates_without_an_assistant_header(records):
    tokenizer = make_tokenizer(BRACKETS, bos_token="<s>")
    example = build_dataset(records(CHAT), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == [" Red.<|im_end|>", " Blue.<|im_end|>"]
    assert whole_text(tokenizer, example).count("<s>") == 1


def test_a_template_without_an_end_of_turn_gets_eos_at_the_end(records):
    tokenizer = make_tokenizer(NO_END_OF_TURN)
    example = build_dataset(records({"messages": CHAT["messages"][:2]}), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == [" Red.\n<|im_end|>"]


def test_an_answer_whose_start_joins_the_prompt_into_one_token(records):
    tokenizer = make_tokenizer()
    newlines = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    tokenizer.backend_tokenizer.add_tokens(["\n\n"])  # as in most vocabularies
    assert len(newlines) == 2 and len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    turns = [{"role": "user", "content": "Name a color."}, {"role": "assistant", "content": "\nRed."}]
    example = build_dataset(records({"messages": turns}), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == ["\n\nRed.<|im_end|>"]


def test_instructions_go_through_the_chat_template(records):
    tokenizer = make_tokenizer()
    dataset = build_dataset(records(INSTRUCTION, {**INSTRUCTION, "input": ""}), tokenizer, 200)
    assert learned_texts(tokenizer, dataset[0]) == ["The sum is 3.<|im_end|>"]
    assert "user\nAdd the numbers.\n\n1 2<|im_end|>" in whole_text(tokenizer, dataset[0])
    assert "user\nAdd the numbers.<|im_end|>" in whole_text(tokenizer, dataset[1])


def test_instructions_without_a_chat_template_use_the_alpaca_prompt(records):
    tokenizer = make_tokenizer(chat_template=None)
    dataset = build_dataset(records(INSTRUCTION, {**INSTRUCTION, "input": ""}), tokenizer, 400)
    for example in dataset:
        assert learned_texts(tokenizer, example) == ["The sum is 3.<|im_end|>"]
    with_input, without_input = (whole_text(tokenizer, example) for example in dataset)
    assert "### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\nThe sum is 3." in with_input
    assert "### Instruction:\nAdd the numbers.\n\n### Response:\nThe sum is 3." in without_input
    assert "Input" not in without_input


def test_braces_in_a_record_are_text(records):
    tokenizer = make_tokenizer(chat_template=None)
    row = {"instruction": "Use {input} and {0}.", "input": "{instruction}", "output": "{x}"}
    text = whole_text(tokenizer, build_dataset(records(row), tokenizer, 400)[0])
    assert "Use {input} and {0}.\n\n### Input:\n{instruction}\n\n### Response:\n{x}<|im_end|>" in text


def test_text_is_learned_whole_with_eos(records):
    tokenizer = make_tokenizer()
    dataset = build_dataset(records({"text": "Name a color."}), tokenizer, 200)
    assert whole_text(tokenizer, dataset[0]) == "Name a color.<|im_end|>"
    assert dataset[0]["labels"].tolist() == [-100, *dataset[0]["input_ids"].tolist()[1:]]
    assert dataset.report().answer_tokens == dataset.report().tokens - 1


@pytest.mark.parametrize("form", ["text", "instruction"])
def test_a_tokenizer_that_starts_texts_with_bos_does_so_once(records, form):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template=None, bos_token="<s>")
    ids = tokenizer.convert_tokens_to_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", ids("<s>")), ("<|im_end|>", ids("<|im_end|>"))]
    )
    row = {"text": "Red."} if form == "text" else INSTRUCTION
    text = whole_text(tokenizer, build_dataset(records(row), tokenizer, 400)[0])
    assert text.startswith("<s>") and text.count("<s>") == 1 and text.count("<|im_end|>") == 1


def test_examples_are_int64_and_start_without_loss(records):
    for form in ("text", "chat"):
        rows = {"text": [{"text": "Red."}], "chat": [CHAT]}[form]
        example = build_dataset(records(*rows), make_tokenizer(), 200)[0]
        assert {key: str(value.dtype) for key, value in example.items()} == {
            "input_ids": "torch.int64",
            "labels": "torch.int64",
        }
        assert example["labels"][0] == -100


def test_a_template_that_rewrites_earlier_messages_is_learned_as_it_writes_the_whole_chat(records):
    tokenizer = make_tokenizer(REWRITES_HISTORY)
    example = build_dataset(records(CHAT), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == ["Red.<|im_end|>", "thought Blue.<|im_end|>"]
    assert whole_text(tokenizer, example) == tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)


def test_a_tokenizer_that_gives_no_offsets_marks_the_same_tokens(records, monkeypatch):
    tokenizer = make_tokenizer(BRACKETS, bos_token="<s>")
    expected = build_dataset(records(CHAT), tokenizer, 200)
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kwargs: BatchEncoding(dict(call(*args, **kwargs))))
    assert build_dataset(records(CHAT), tokenizer, 200).fingerprint() == expected.fingerprint()


def test_spaces_and_characters_of_several_tokens_at_the_ends_of_answers_are_learned(records):
    tokenizer = make_tokenizer(NO_END_OF_TURN)
    turns = [{"role": "user", "content": "Name a color."}, {"role": "assistant", "content": "\u2728 Red.   \U0001f600  "}]
    example = build_dataset(records({"messages": turns}), tokenizer, 200)[0]
    assert learned_texts(tokenizer, example) == ["\u2728 Red.   \U0001f600  \n<|im_end|>"]


def test_tokens_of_any_span_of_any_text(records):
    """Against the ranges of characters that all tokens have, of texts whose spaces and characters are several tokens."""
    random = Random(0)
    tokenizer = make_tokenizer()
    for _ in range(200):
        text = "".join(random.choice([" ", "  ", "\n", "Red", "a", "\U0001f600", "\u00e9", "<|im_end|>"]) for _ in range(12))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets, count = encoded["offset_mapping"], len(encoded["input_ids"])
        starts = [min(start, offsets[at - 1][1] if at else 0) for at, (start, _) in enumerate(offsets)]
        begin, end = sorted(random.sample(range(len(text) + 1), 2))
        expected = [at for at in range(count) if offsets[at][1] > begin and starts[at] < end]
        assert list(range(*_tokens_of((begin, end), encoded.encodings[0], count))) == expected, (text, begin, end)


def test_a_special_token_inside_an_answer_does_not_end_it(records):
    for template, end in ((CHATML, "<|im_end|>"), (NO_END_OF_TURN, "\n<|im_end|>")):
        tokenizer = make_tokenizer(template)
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "say <|im_start|> or <s> twice"}]
        example = build_dataset(records({"messages": turns}), tokenizer, 200)[0]
        assert learned_texts(tokenizer, example)[0].strip() == f"say <|im_start|> or <s> twice{end}".strip()


@pytest.mark.parametrize("form", ["text", "instruction", "continuation", "chat"])
def test_records_that_bring_bos_or_eos_get_no_second_ones(records, form):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(CHATML if form == "chat" else None, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    row = {
        "text": {"text": "<s>Red.<|im_end|>\n"},
        "instruction": {**INSTRUCTION, "output": "Red.<|im_end|>"},
        "continuation": {"prompt": "<s>Name a color.", "completion": "Red.<|im_end|>"},
        "chat": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Red.<|im_end|>\n"}]},
    }[form]
    text = whole_text(tokenizer, build_dataset(records(row), tokenizer, 400)[0])
    assert text.count("Red.<|im_end|>") == 1 and "<|im_end|><|im_end|>" not in text.replace("\n", "")
    assert text.count("<s>") == (form != "chat")


def test_a_continuation_is_learned_from_where_the_prompt_ends(records):
    tokenizer = make_tokenizer()
    example = build_dataset(records({"prompt": "Name a color.", "completion": " Red."}), tokenizer, 200)[0]
    assert whole_text(tokenizer, example) == "Name a color. Red.<|im_end|>"
    assert learned_texts(tokenizer, example) == [" Red.<|im_end|>"]


def test_chats_need_a_chat_template(records):
    with pytest.raises(DataError, match=r"data.jsonl: chat records need a chat template.*tokenizer has none"):
        build_dataset(records(CHAT), make_tokenizer(chat_template=None), 200)


def test_a_chat_that_the_template_refuses_is_named(records):
    refused = {"messages": [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]}
    tokenizer = make_tokenizer(BRACKETS, bos_token="<s>")
    with pytest.raises(DataError, match=r"data.jsonl, line 2: .*refuses.*Only user and assistant roles are supported!"):
        build_dataset(records(CHAT, refused), tokenizer, 200)


@pytest.mark.parametrize(
    ("row", "chat_template"), [(CHAT, CHATML), (INSTRUCTION, CHATML), (INSTRUCTION, None), ({"text": "Red."}, None)]
)
def test_a_tokenizer_without_eos_is_refused(records, row, chat_template):
    with pytest.raises(DataError, match=r"no end-of-sequence token.*Set tokenizer.eos_token"):
        build_dataset(records(row), make_tokenizer(chat_template, eos=None), 200)


SHORT, LONG = {"text": "Red."}, {"text": "Blue. " * 30}


def test_long_records_are_cut_and_counted(records):
    tokenizer = make_tokenizer()
    dataset = build_dataset(records(SHORT, LONG), tokenizer, 10)
    full = build_dataset(records(SHORT, LONG), tokenizer, 500)
    assert [len(example["input_ids"]) for example in dataset] == [len(full[0]["input_ids"]), 10]
    assert dataset[1]["input_ids"].tolist() == full[1]["input_ids"].tolist()[:10]
    assert (dataset.report().examples, dataset.report().truncated, full.report().truncated) == (2, 1, 0)
    assert "2 examples" in str(dataset.report()) and "1 truncated" in str(dataset.report())


def test_a_record_of_just_max_length_is_whole(records):
    tokenizer = make_tokenizer()
    length = build_dataset(records(LONG), tokenizer, 500).report().tokens
    dataset = build_dataset(records(LONG), tokenizer, length, context_length=length, overlong="error")
    assert dataset[0]["labels"][-1] == tokenizer.eos_token_id


def test_long_records_can_be_dropped(records):
    dataset = build_dataset(records(SHORT, LONG, SHORT), make_tokenizer(), 10, overlong="drop")
    report = dataset.report()
    assert (len(dataset), report.dropped_overlong, report.truncated) == (2, 1, 0)


def test_long_records_can_be_errors(records):
    with pytest.raises(DataError, match=r"data.jsonl, line 2: .* tokens, more than max_length=10. Raise max_length.*'drop'"):
        build_dataset(records(SHORT, LONG), make_tokenizer(), 10, overlong="error")


def test_a_record_cut_before_its_answer_is_dropped_and_counted(records):
    long_prompt = {**INSTRUCTION, "input": "1 2 " * 100}
    dataset = build_dataset(records(long_prompt, INSTRUCTION), make_tokenizer(), 100)
    report = dataset.report()
    assert (report.examples, report.dropped_unanswered, report.truncated) == (1, 1, 0)


def test_a_data_set_of_which_nothing_is_left_is_refused(records):
    message = r"no example is left of 1 records at max_length=8: 0 were too long.*1 had no answer.*Raise max_length"
    with pytest.raises(DataError, match=message):
        build_dataset(records(INSTRUCTION), make_tokenizer(), 8)


def test_max_length_above_the_models_context_is_refused(records):
    with pytest.raises(DataError, match=r"max_length=513 is above the model's context of 512 .* Set max_length to 512 or less"):
        build_dataset(records(SHORT), make_tokenizer(), 513, context_length=512)


def test_settings_that_cannot_work_are_refused(records):
    with pytest.raises(ConfigError, match="overlong='cut' is unknown. Give one of 'truncate', 'drop', 'error'"):
        build_dataset(records(SHORT), make_tokenizer(), 10, overlong="cut")
    with pytest.raises(ConfigError, match="max_length=1: give at least 2"):
        build_dataset(records(SHORT), make_tokenizer(), 1)


def test_more_records_than_one_call_of_the_tokenizer_takes_keep_their_order(records):
    tokenizer = make_tokenizer()
    rows = [{"messages": CHAT["messages"][: 2 + 2 * (index % 2)]} for index in range(600)]
    dataset = build_dataset(records(*rows), tokenizer, 200)
    assert len(dataset) == 600
    for index in (0, 1, 255, 256, 511, 512, 599):
        assert len(learned_texts(tokenizer, dataset[index])) == 1 + index % 2


def test_the_report_counts_tokens(records):
    dataset = build_dataset(records(CHAT, {"messages": CHAT["messages"][:2]}), make_tokenizer(), 200)
    report = dataset.report()
    assert report.tokens == sum(len(example["input_ids"]) for example in dataset)
    assert report.answer_tokens == sum(int((example["labels"] != -100).sum()) for example in dataset)


def test_packing_keeps_every_example(records):
    tokenizer = make_tokenizer()
    rows = [CHAT, CHAT, {"messages": CHAT["messages"][:2]}]
    plain, packed = (build_dataset(records(*rows), tokenizer, 200, packing=packing) for packing in (False, True))
    assert packed.report().answer_tokens == plain.report().answer_tokens
    assert packed.report().row_tokens == 200 * len(packed) and len(packed) < len(plain)
    assert "packed into" in str(packed.report())
    learned = sorted(text for row in packed for text in learned_texts(tokenizer, row))
    assert learned == sorted(text for example in plain for text in learned_texts(tokenizer, example))
