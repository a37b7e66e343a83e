"""Every file that records come in, whole, in parts, in mixes and damaged; the table of forms and files in docs/data.md."""

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pytest

from losia_dist.data import build_dataset, load_records
from losia_dist.errors import ConfigError, DataError
from tests.unit.data.test_data_encoding import learned_texts
from tests.unit.data.test_data_forms import FORMS, TOOLS_TEMPLATE, make_tokenizer

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
ROWS = {
    "messages": FORMS["messages"],
    "messages, tools and calls": FORMS["tools"],
    "ShareGPT": FORMS["ShareGPT"],
    "Alpaca": FORMS["Alpaca with system and history"],
    "prompt and completion": FORMS["TRL, texts"],
    "prompt and completion of messages": FORMS["TRL, messages"],
    "text": ({"text": "Say"}, None, "Say"),
}
FILES = ("jsonl", "json", "parquet", "csv", "tsv", "txt", "arrow", "saved")
REFUSED = "no"


def flat(value):
    """As a table of texts holds it: nested values are JSON text."""
    return value if isinstance(value, str) else json.dumps(value)


def write(directory, kind, rows, compression=""):
    """`rows` as a file of this kind; the path that is given to load_records."""
    path = directory / f"data.{kind}"
    if kind in ("jsonl", "json"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines if kind == "jsonl" else json.dumps(rows))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows({key: flat(value) for key, value in row.items()} for row in rows)
    elif kind == "txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    else:
        table = datasets.Dataset.from_list(rows)
        if kind == "parquet":
            table.to_parquet(path)
        elif kind == "saved":
            table.save_to_disk(path)
        else:
            with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.data.table.schema) as writer:
                writer.write_table(table.data.table.combine_chunks())
    return compress(path, compression) if compression else path


def compress(path, compression):
    packed = path.with_name(path.name + "." + compression)
    if compression == "gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pyarrow.output_stream(str(packed), compression="zstd") as stream:
            stream.write(path.read_bytes())
    path.unlink()
    return packed


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TOOLS_TEMPLATE)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def is_read(tmp_path, tokenizer, form, kind):
    row, learned, whole = ROWS[form]
    if kind == "txt" and form != "text":
        return False  # a line is a text, so that a record of another form is another record
    dataset = build_dataset(load_records(write(tmp_path, kind, [row, row])), tokenizer, 400)
    assert len(dataset) == 2
    for example in dataset:
        assert whole in tokenizer.decode(example["input_ids"])
        assert learned is None or learned_texts(tokenizer, example) == learned
    return True


def test_the_table_in_the_docs_is_what_is_read(tmp_path, tokenizer):
    lines = ["| | " + " | ".join(f"`.{kind}`" if kind != "saved" else "saved" for kind in FILES) + " |"]
    lines.append("|---" * (len(FILES) + 1) + "|")
    for form in ROWS:
        cells = []
        for kind in FILES:
            directory = tmp_path / form.replace(" ", "-") / kind
            directory.mkdir(parents=True)
            cells.append("yes" if is_read(directory, tokenizer, form, kind) else REFUSED)
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    assert "\n".join(lines) in DOCS.read_text(), "\n" + "\n".join(lines)


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "txt"])
def test_compressed_files(tmp_path, kind, compression):
    rows = [{"text": "one"}, {"text": "007"}, {"text": "NA"}]
    assert texts(load_records(write(tmp_path, kind, rows, compression))) == ["one", "007", "NA"]


def texts(records):
    return [record["text"] for record in records]


def numbered(directory, name, start, stop):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(start, stop)))
    return str(directory / name)


def test_tables_keep_texts_that_look_like_something_else_and_lose_the_nulls_of_other_records(tmp_path):
    rows = [{"instruction": "a", "output": "007"}, {"instruction": "NA", "output": "1.50"}]
    for kind in ("csv", "tsv"):
        assert [r["output"] for r in load_records(write(tmp_path, kind, rows))] == ["007", "1.50"]
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        FORMS["tools"][0] | {"tools": None},
    ]
    other = json.loads(json.dumps(chats[1]).replace("city", "place"))
    first, *calling = load_records(write(tmp_path, "parquet", [*chats, other]))
    assert first == {"messages": chats[0]["messages"]}
    for found, given in zip(calling, (chats[1], other), strict=True):
        assert found["messages"][1]["tool_calls"] == given["messages"][1]["tool_calls"]


def test_directories_and_globs_are_read_in_the_order_of_their_names(tmp_path):
    numbered(tmp_path / "d", "b.jsonl", 0, 1)
    numbered(tmp_path / "d", "a.jsonl", 0, 2)
    numbered(tmp_path / "d" / "deep", "c.jsonl", 0, 1)
    (tmp_path / "d" / "notes.md").write_text("not a record")
    assert texts(load_records(tmp_path / "d")) == ["a.jsonl 0", "a.jsonl 1", "b.jsonl 0", "c.jsonl 0"]
    records = load_records(str(tmp_path / "d" / "[ab].jsonl"))
    assert texts(records) == ["a.jsonl 0", "a.jsonl 1", "b.jsonl 0"]
    assert records.place(1).endswith("a.jsonl, line 2") and records.place(2).endswith("b.jsonl, line 1")
    with pytest.raises(DataError, match="no file of records there"):
        load_records(str(tmp_path / "x" / "*.jsonl"))


def test_parts_of_files(tmp_path):
    file = numbered(tmp_path, "a.jsonl", 0, 6)
    assert texts(load_records(f"{file}[:2]")) == ["a.jsonl 0", "a.jsonl 1"]
    records = load_records(f"{file}[4:]")
    assert texts(records) == ["a.jsonl 4", "a.jsonl 5"] and records.place(0).endswith("a.jsonl, line 5")
    with pytest.raises(DataError, match=r"a.jsonl\[9:\]: the data set is empty"):
        load_records(f"{file}[9:]")


def test_several_sources_are_joined_or_mixed_in_shares(tmp_path):
    one, two = numbered(tmp_path, "a.jsonl", 0, 90), numbered(tmp_path, "b.jsonl", 0, 20)
    assert len(load_records([one, two])) == 110
    records = load_records([f"{one}:0.75", f"{two}:0.25"])
    found = texts(records)
    assert [sum(text.startswith(name) for text in found) for name in "ab"] == [60, 20]
    assert len(set(found)) == 80 and texts(load_records([f"{one}:3", f"{two}:1"])) == found
    assert records.place(79).endswith("b.jsonl, line 20")
    for wrong in ([f"{one}:0.5", two], [f"{one}:0", f"{two}:1"]):
        with pytest.raises(ConfigError, match="give every source a weight above 0"):
            load_records(wrong)


DAMAGE = {
    "jsonl.gz": ("cannot be unpacked: .*cut short: copy or write it anew", lambda data: data[: len(data) // 2]),
    "jsonl.zst": ("cannot be unpacked: .*cut short", lambda data: data[: len(data) // 2]),
    "parquet": ("cannot be read as parquet: .*damaged, cut short", lambda data: data[: len(data) // 2]),
    "arrow": ("cannot be read as arrow: .*damaged, cut short", lambda data: b"ARROW1" + data[: len(data) // 2]),
    "csv": ("cannot be read as csv: .*line 4", lambda data: data + b'"x",3,4\n'),
    "txt": ("line 2: not UTF-8", lambda data: data[:-2] + b"\xff\n"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named(tmp_path, kind):
    words, damage = DAMAGE[kind]
    name, _, compression = kind.partition(".")
    rows = [{"text": f"long enough to be compressed {i * 7919}"} for i in range(2)]
    path = write(tmp_path, name, rows, compression)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path.name}.*{words}"):
        load_records(path)


def test_a_malformed_line_of_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl.gz, line 3: malformed JSON"):
        load_records(compress(path, "gz"))


def test_a_large_file_of_lines_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "x" * 20_000}) + "\n") * 1_000)
    tracemalloc.start()
    try:
        assert len(load_records(path)) == 1_000
        assert tracemalloc.get_traced_memory()[1] < 2e6  # of a file of 20 MB
    finally:
        tracemalloc.stop()
