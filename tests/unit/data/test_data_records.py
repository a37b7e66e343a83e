"""Reading records: every source and form; for each thing that can be wrong, a message with its place and the fix."""

import json

import datasets
import pytest

from losia_dist.data import load_records, train_validation_split
from losia_dist.errors import ConfigError, DataError

INSTRUCTION = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TEXT = {"text": "Once upon a time."}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("record", "form"), [(INSTRUCTION, "instruction"), (CHAT, "chat"), (TEXT, "text")])
@pytest.mark.parametrize("source", ["jsonl", "json", "directory", "split directory", "hub"])
def test_every_form_reads_from_every_source(tmp_path, monkeypatch, record, form, source):
    rows = [record, record]
    if source == "jsonl":
        place = write(tmp_path / "data.jsonl", *rows)
    elif source == "json":
        place = tmp_path / "data.json"
        place.write_text(json.dumps(rows, indent=1))
    elif source == "directory":
        place = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(place)
    elif source == "split directory":
        saved = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": saved.select([0]), "extra": saved}).save_to_disk(tmp_path / "saved")
        place = f"{tmp_path / 'saved'}:extra"
    else:
        asked = []
        hub = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or hub)
        place = "someone/data:extra"
    records = load_records(place)
    assert records.form == form
    assert list(records) == rows
    if source == "hub":
        assert asked == [(("someone/data", None), {"split": "extra"})]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("someone/data", (("someone/data", None), {"split": "train"})),
        ("someone/data:main:test", (("someone/data", "main"), {"split": "test"})),
    ],
)
def test_hub_names_take_a_split_and_a_configuration(monkeypatch, name, arguments):
    asked = []
    hub = datasets.Dataset.from_list([TEXT])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or hub)
    load_records(name)
    assert asked == [arguments]


def test_prompt_and_response_are_an_instruction_and_completions_go_on(tmp_path):
    records = load_records(write(tmp_path / "data.jsonl", {"prompt": "Hi", "response": "Hello"}))
    assert list(records) == [{"instruction": "Hi", "input": "", "output": "Hello"}]
    records = load_records(write(tmp_path / "more.jsonl", {"prompt": "Hi", "completion": " there"}))
    assert (records.form, list(records)) == ("continuation", [{"prompt": "Hi", "completion": " there"}])


def test_form_overrides_what_the_first_record_suggests(tmp_path):
    path = write(tmp_path / "data.jsonl", {**INSTRUCTION, **TEXT})
    assert load_records(path).form == "instruction"
    assert list(load_records(path, form="text")) == [TEXT]


def test_nulls_count_as_missing_and_further_keys_of_messages_reach_the_template(tmp_path):
    tool = {"role": "tool", "content": "4", "name": "add", "tool_call_id": None}
    path = write(tmp_path / "data.jsonl", {"messages": [CHAT["messages"][0], tool, CHAT["messages"][1]], "text": None})
    assert load_records(path)[0]["messages"][1] == {"role": "tool", "content": "4", "name": "add"}
    path = write(tmp_path / "more.jsonl", {**INSTRUCTION, "input": None})
    assert load_records(path)[0]["input"] == ""


MESSAGE = "data.jsonl, line 3, message 1"
BAD_THIRD_LINES = {
    "cut off": (TEXT, '{"text": "a', ["data.jsonl, line 3: malformed JSON", "column 10", "one JSON object"]),
    "list": (TEXT, "[1]", ["data.jsonl, line 3: expected a JSON object, got list [1]", "Give one on each line"]),
    "null": (TEXT, "null", ["data.jsonl, line 3: expected a JSON object, got NoneType None"]),
    "missing": (
        INSTRUCTION,
        {"instruction": "a", "outptu": "b"},
        ["line 3", "needs 'instruction' and 'output'", "'outptu'"],
    ),
    "other form": (TEXT, CHAT, ["data.jsonl, line 3", "form 'text' needs 'text'", "It has 'messages'", "form=..."]),
    "null value": (TEXT, {"text": None}, ["data.jsonl, line 3", "needs 'text'", "It has no keys"]),
    "number": (TEXT, {"text": 5}, ["data.jsonl, line 3: 'text' must be a string, got int 5"]),
    "list output": (
        INSTRUCTION,
        {**INSTRUCTION, "output": ["3"]},
        ["line 3: 'output' must be a string, got list ['3']"],
    ),
    "number input": (INSTRUCTION, {**INSTRUCTION, "input": 3}, ["line 3: 'input' must be a string, got int 3"]),
    "no messages": (CHAT, {"messages": []}, ["data.jsonl, line 3: 'messages' must be a non-empty list"]),
    "messages as text": (CHAT, {"messages": "Hi"}, ["line 3: 'messages' must be a non-empty list", "str 'Hi'"]),
    "message as text": (CHAT, {"messages": [CHAT["messages"][0], "Hi"]}, [MESSAGE + ": expected an object"]),
    "no role": (CHAT, {"messages": [CHAT["messages"][0], {"content": "a"}]}, [MESSAGE + ": 'role' is missing"]),
    "no content": (
        CHAT,
        {"messages": [CHAT["messages"][0], {"role": "assistant"}]},
        [MESSAGE + ": 'content' is missing"],
    ),
    "role": (
        CHAT,
        {"messages": [CHAT["messages"][0], {"role": "bot", "content": "a"}]},
        [MESSAGE + ": unknown role 'bot'", "'system', 'developer', 'user', 'assistant', 'tool'"],
    ),
    "content": (
        CHAT,
        {"messages": [CHAT["messages"][0], {"role": "assistant", "content": ["a"]}]},
        [MESSAGE + ": 'content' must be a string, or a list of {type: text, text}, got list"],
    ),
    "no assistant": (
        CHAT,
        {"messages": CHAT["messages"][:1]},
        ["data.jsonl, line 3: no message has the role 'assistant'"],
    ),
    "assistant first": (
        CHAT,
        {"messages": CHAT["messages"][::-1]},
        ["data.jsonl, line 3, message 0: a chat cannot start with the assistant"],
    ),
}


@pytest.mark.parametrize("case", BAD_THIRD_LINES)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, case):
    good, bad, parts = BAD_THIRD_LINES[case]
    path = write(tmp_path / "data.jsonl", good, "", bad)  # the empty line carries no record but counts as a line
    with pytest.raises(DataError) as error:
        load_records(path)
    for part in parts:
        assert part in str(error.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"data.jsonl, line 2: not UTF-8 text .* Save the file as UTF-8"):
        load_records(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [record["text"] for record in load_records(path)] == ["a", "b"]


def test_a_first_record_of_no_form_lists_the_forms(tmp_path):
    with pytest.raises(DataError, match=r"data.jsonl, line 1: .*fits no form.*'question'.*instruction: .*chat: .*text: "):
        load_records(write(tmp_path / "data.jsonl", {"question": "a"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"data.json: the data set is empty"),
        ('[\n{"text": "a"},\n{"text" "b"}]', r"data.json, line 3: malformed JSON"),
        ('{"text": "a"}\n{"text" "b"}', r"data.json, line 2: malformed JSON"),
        ("3", r"data.json, line 1: expected a JSON object, got int 3. Give one on each line, or a list of them"),
        ('[{"text": "a"}, 3]', r"data.json, record 1: expected a JSON object, got int 3"),
        ("[]", r"data.json: the data set is empty"),
    ],
)
def test_a_bad_json_file_is_explained(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_records(path)


def test_bad_records_of_a_saved_directory_are_named_by_index(tmp_path):
    datasets.Dataset.from_list([TEXT, {"text": None}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved, record 1: .*needs 'text'"):
        load_records(tmp_path / "saved")


def test_empty_data_sets_are_refused(tmp_path):
    for path in (write(tmp_path / "none.jsonl"), write(tmp_path / "blank.jsonl", "", " ")):
        with pytest.raises(DataError, match=rf"{path.name}: the data set is empty"):
            load_records(path)


def test_sources_that_do_not_exist_are_explained(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"absent.jsonl: no such file"):
        load_records(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"absent: no such file or directory"):
        load_records(tmp_path / "absent")
    with pytest.raises(
        DataError, match=r"data.docx: cannot read a '.docx' file. Convert it to one of .jsonl, .*each also .gz, .zst"
    ):
        load_records(write(tmp_path / "data.docx", "a,b"))
    with pytest.raises(DataError, match=r"write a hub data set as"):
        load_records("a:b:c:d")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"someone/data: no such file .*split 'train'.*ConnectionError: no route.*network"):
        load_records("someone/data")


def test_directories_and_splits_that_do_not_fit_are_explained(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other: no file of records there .*no data set that was saved"):
        load_records(tmp_path / "other")
    saved = datasets.Dataset.from_list([TEXT])
    saved.save_to_disk(tmp_path / "plain")
    with pytest.raises(DataError, match=r"without splits. Leave out ':test'"):
        load_records(f"{tmp_path / 'plain'}:test")
    datasets.DatasetDict({"a": saved, "b": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"splits: no split 'train'. Give one of '.*splits:a', '.*splits:b'"):
        load_records(tmp_path / "splits")


def test_an_unknown_form_is_a_setting_error(tmp_path):
    with pytest.raises(
        ConfigError, match="form='alpaca' is unknown. Give one of 'instruction', 'chat', 'continuation', 'text'"
    ):
        load_records(write(tmp_path / "data.jsonl", TEXT), form="alpaca")


def texts(records):
    return [record["text"] for record in records]


def numbered(tmp_path, count):
    return load_records(write(tmp_path / "data.jsonl", *({"text": f"text {index}"} for index in range(count))))


@pytest.mark.parametrize(("size", "expected"), [(3, 3), (0.25, 5), (0.001, 1)])
def test_the_validation_split_divides_the_records(tmp_path, size, expected):
    records = numbered(tmp_path, 20)
    train, validation = train_validation_split(records, size, seed=1)
    assert len(validation) == expected
    assert sorted(texts(train) + texts(validation)) == sorted(texts(records))
    again = train_validation_split(records, size, seed=1)
    assert texts(again[1]) == texts(validation)
    assert texts(train_validation_split(records, 10, seed=2)[1]) != texts(train_validation_split(records, 10, seed=1)[1])


def test_split_records_still_know_their_line(tmp_path):
    records = numbered(tmp_path, 20)
    _, validation = train_validation_split(records, 1)
    number = int(records.raw.place(int(validation[0]["text"].split()[1])).rpartition(" ")[2])
    assert validation.place(0) == f"{tmp_path / 'data.jsonl'}, line {number}"
    assert records[2:4].place(0).endswith("line 3")


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.0, 1.5, True, "3"])
def test_a_validation_size_that_means_nothing_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match="validation_size=.*number of records"):
        train_validation_split(numbered(tmp_path, 4), size)


def test_a_split_that_leaves_nothing_for_training_is_refused(tmp_path):
    with pytest.raises(DataError, match="4 of 4 records for validation leave none for training"):
        train_validation_split(numbered(tmp_path, 4), 4)
