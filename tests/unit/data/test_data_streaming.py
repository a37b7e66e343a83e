"""Streams: the same data set as from records that are kept, made in any number of parts."""

import json

import datasets
import pytest

from losia_dist.data import build_dataset, cache, load_records
from losia_dist.data.streaming import Stream, of_hub
from losia_dist.errors import ConfigError, DataError
from tests.unit.data.test_data_cache import ROWS, SETTINGS, make, same
from tests.unit.data.test_data_encoding import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def files(tmp_path):
    """A directory of tables, one of lines, and one that `datasets` saved."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "lines").mkdir()
    for number in range(3):
        part = datasets.Dataset.from_list(ROWS[number * 3 : number * 3 + 3])
        part.to_parquet(tmp_path / "tables" / f"{number}.parquet")
        text = "".join(json.dumps(row) + "\n" for row in ROWS[number * 3 : number * 3 + 3])
        (tmp_path / "lines" / f"{number}.jsonl").write_text(text)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("names", [["tables"], ["lines"], ["saved"], ["tables/*.parquet", "lines/1.jsonl"], ["tables[2:7]"]])
def test_a_stream_makes_the_data_set_of_the_records(files, tokenizer, monkeypatch, parts, names):
    monkeypatch.setattr(cache, "_BLOCK", 2)
    sources = [str(files / name) for name in names]
    expected = build_dataset(load_records(sources), tokenizer, 60)
    stream = Stream(sources)
    key = make(files / "kept", stream, tokenizer, parts=parts)
    found = cache.find(files / "kept", key, 60)
    assert same(found, expected) and found.report() == expected.report() and found.unused == ["id"]


@pytest.mark.parametrize("part", ["", "[1:4]"])
def test_shards_of_a_hub_data_set_are_read_in_order(files, tokenizer, part):
    """A directory of shards is to `datasets` what a name on the hub is."""
    parts, identity = of_hub("name", str(files / "tables"), None, "train")
    assert len(parts) == 3 and parts[1].place(2) == "name, shard 1, record 2"
    rows = [row["messages"] for part in parts for row in part.rows()]
    assert rows == [row["messages"] for row in load_records(files / "tables").raw.rows]
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(files / "tables" / "1.parquet")
    assert of_hub("name", str(files / "tables"), None, "train")[1] != identity


def test_another_source_is_another_data_set(files, tokenizer):
    def key(*names, **options):
        return cache.key_of(Stream([str(files / name) for name in names], **options), tokenizer, SETTINGS)

    first = key("tables")
    assert key("tables") == first
    others = [key("tables[1:]"), key("tables[1:5]"), key("tables", "lines"), key("saved")]
    (files / "tables" / "2.parquet").unlink()
    assert len({first, *others, key("tables")}) == 6


def test_what_a_stream_cannot_do_is_one_error(files, tokenizer):
    with pytest.raises(ConfigError, match="shares of a mix need the number of records"):
        Stream([f"{files / 'tables'}:0.5", f"{files / 'lines'}:0.5"])
    (files / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty.jsonl: the data set is empty"):
        Stream(files / "empty.jsonl")
    with pytest.raises(DataError, match="absent.parquet: no such file"):
        Stream(files / "absent.parquet")
    with pytest.raises(DataError, match="no such file or directory, and reading it as the data set 'some/name'"):
        Stream("some/name")
    (files / "lines" / "1.jsonl").write_text('{"messages": 3}\n')
    with pytest.raises(DataError, match="1.jsonl, line 1: 'messages' must be a non-empty list"):
        make(files / "kept", Stream(files / "lines"), tokenizer)
    table = files / "tables" / "2.parquet"
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(DataError, match="2.parquet: cannot be read as"):
        make(files / "kept", Stream(files / "tables"), tokenizer)
