"""Tokenized data on disk: the same examples as in memory, found again, never out of date, made anew when damaged."""

import errno
import json
import os
import shutil
import time

import pytest

from losia_dist.data import Records, build_dataset, cache, load_records
from losia_dist.data.build import pack
from losia_dist.data.dataset import Settings
from losia_dist.errors import DataError
from tests.unit.data.test_data_encoding import CHAT, CHATML, make_tokenizer

SETTINGS = Settings(60)
ROWS = [{"messages": CHAT["messages"][: 2 + 2 * (i % 2)], "id": i} for i in range(9)] + [
    {"messages": [{"role": "user", "content": "long " * 100}, *CHAT["messages"][1:2]]}
]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def source(tmp_path, rows=ROWS, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(directory, records, tokenizer, settings=SETTINGS, parts=3):
    key = cache.key_of(records, tokenizer, settings)
    making = cache.begin(directory, key)
    written = []
    for part in range(parts):
        cache.write_part(making, part, parts, records, tokenizer, settings, written.append)
    cache.join(making, parts, key)
    if isinstance(records, Records):
        assert sum(written) == len(records)
    return key


def same(one, other):
    return len(one) == len(other) and all(
        a[key].tolist() == b[key].tolist() and a[key].dtype == b[key].dtype
        for a, b in zip(one, other, strict=True)
        for key in ("input_ids", "labels")
    )


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_parts_make_the_data_set_that_one_process_holds_in_memory(tmp_path, tokenizer, monkeypatch, parts):
    monkeypatch.setattr(cache, "_BLOCK", 2)
    records = load_records(source(tmp_path), check=False)
    expected = build_dataset(records, tokenizer, 60)
    key = make(tmp_path / "kept", records, tokenizer, parts=parts)
    found = cache.find(tmp_path / "kept", key, 60)
    assert same(found, expected) and found.report() == expected.report() and found.fingerprint() == expected.fingerprint()
    assert found.unused == ["id"] and found.report().dropped_unanswered == 1
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [key]
    assert pack(found, tokenizer).rows == pack(expected, tokenizer).rows


def test_another_record_tokenizer_template_or_setting_is_another_data_set(tmp_path, tokenizer):
    path = source(tmp_path)
    keys = {cache.key_of(load_records(path), tokenizer, SETTINGS)}

    def new(records, tokenizer=tokenizer, settings=SETTINGS):
        before = len(keys)
        keys.add(cache.key_of(records, tokenizer, settings))
        return len(keys) > before

    assert not new(load_records(path))
    assert not new(load_records(shutil.copy(path, tmp_path / "copy.jsonl")))  # by content, not by name
    assert new(load_records(path)[:5]) and new(load_records(f"{path}[1:]")) and new(load_records([path, path]))
    assert new(load_records(path), settings=Settings(61)) and new(load_records(path), settings=Settings(60, "drop"))
    assert new(load_records(path), settings=Settings(60, chat_template=CHATML + " "))
    assert new(load_records(path), tokenizer=make_tokenizer(CHATML + "!"))
    assert new(load_records(path), tokenizer=make_tokenizer(eos="<s>"))
    times = path.stat()
    source(tmp_path, [*ROWS[:-1], {**ROWS[-1], "id": 1}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert new(load_records(path))
    assert cache.key_of(load_records(path), object(), SETTINGS) is None


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest", "not JSON"])
def test_a_damaged_data_set_is_not_found_and_made_anew(tmp_path, tokenizer, damage):
    records = load_records(source(tmp_path))
    key = make(tmp_path, records, tokenizer)
    ids, manifest = tmp_path / key / "ids.bin", tmp_path / key / "manifest.json"
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "missing":
        ids.unlink()
    else:
        manifest.write_text("{}" if damage == "manifest" else "{")
    assert cache.find(tmp_path, key, 60) is None
    assert make(tmp_path, records, tokenizer) == key
    assert same(cache.find(tmp_path, key, 60), build_dataset(records, tokenizer, 60))


def test_a_full_disk_is_one_error_with_what_to_do(tmp_path, tokenizer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    records = load_records(source(tmp_path))
    monkeypatch.setattr("losia_dist.data.dataset.TokenizedDataset.write", full)
    with pytest.raises(DataError, match="kept: tokenized data cannot be written there: the disk is full. .*--data_cache off"):
        make(tmp_path / "kept", records, tokenizer)


def test_what_was_left_half_made_is_removed_a_day_later(tmp_path, monkeypatch):
    first = cache.begin(tmp_path, "a")
    second = cache.begin(tmp_path, "b")
    assert first.is_dir()
    monkeypatch.setattr(cache, "_ABANDONED", -1)
    cache.begin(tmp_path, "c")
    assert not first.exists() and not second.exists()


def test_a_data_set_that_is_deleted_goes_on_where_it_is_mapped_and_its_use_is_noted(tmp_path, tokenizer):
    path, kept = source(tmp_path, ROWS[:4], "4.jsonl"), tmp_path / "kept"
    key = make(kept, load_records(path), tokenizer)
    os.utime(kept / key / "manifest.json", (0, 0))
    mapped = cache.find(kept, key, 60)
    assert time.time() - (kept / key / "manifest.json").stat().st_mtime < 60
    shutil.rmtree(kept / key)
    assert cache.find(kept, key, 60) is None and same(mapped, build_dataset(load_records(path), tokenizer, 60))
