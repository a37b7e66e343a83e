"""The script's options of the data: what they change in what is learned, and what a resumed run keeps."""

import json
from datetime import date

import pytest
from transformers import AutoTokenizer

from losia_dist.recipe import run_data
from tests.launch.test_bad_inputs import refused
from tests.launch.test_script_engines import losses, train
from tests.support.launching import arguments

DATED = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def at(monkeypatch, day):
    class Today(date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(run_data, "date", Today)


@pytest.fixture
def dated(tmp_path):
    file = tmp_path / "dated.jinja"
    file.write_text(DATED)
    return file


def test_a_run_resumed_on_another_day_keeps_the_day_of_its_start(material, tmp_path, monkeypatch, dated, capsys):
    options = {"chat_template": dated, "max_steps": 4, "save_steps": 2, "eval_file": None}
    at(monkeypatch, "2026-03-01")
    whole = train(arguments(material, tmp_path / "whole", **options))[0]
    assert any("2026-03-01, kept when the run is resumed" in note for note in whole["notes"])
    train(arguments(material, tmp_path / "run", **options, no_save=True))
    for file in sorted((tmp_path / "run" / "checkpoints").glob("step-*4")):
        (file / "COMPLETE").unlink()
    at(monkeypatch, "2026-03-02")
    resumed = train(arguments(material, tmp_path / "run", **options, resume=True))[0]
    assert resumed["resumed_from_step"] == 2 and resumed["notes"] == whole["notes"]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    words = arguments(material, tmp_path / "run", **options, resume=True, template_date="2026-03-02")
    message = refused(capsys, words)
    assert "the date that the chat template writes (--template_date) was 2026-03-01" in message and "is 2026-03-02" in message


def test_a_template_file_is_learned_by_and_saved_with_the_model(material, tmp_path, dated):
    train(arguments(material, tmp_path / "run", chat_template=dated, template_date="2026-03-05", max_steps=1))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == DATED


def test_columns_name_the_keys_of_a_form(material, tmp_path):
    rows = [json.loads(line) for line in material["instruction"].read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"q": r["instruction"], "a": r["output"], "id": 1}) + "\n" for r in rows))
    options = {"max_steps": 2, "eval_file": None}
    train(arguments(material, tmp_path / "plain", **options))
    words = [*arguments(material, tmp_path / "run", **options, train_file=other), "--columns", "q=instruction", "a=output"]
    summary = train(words)[0]
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert summary["notes"] == [f"not used of {other}: id"]


@pytest.fixture
def kept(material, tmp_path):
    """Options of a short run on two ranks that keeps its tokens in a directory of its own; the directory."""
    options = {"data_cache": tmp_path / "kept", "max_steps": 2, "no_save": True, "packing": True, "micro_batch": 1}
    return options, tmp_path / "kept"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_ranks_tokenize_together_and_the_next_start_finds_it(ranks, material, tmp_path, kept, monkeypatch):
    options, directory = kept
    made = ranks(2, train, arguments(material, tmp_path / "made", **options))[0][0]
    assert made["data_from"].startswith("made by 2 rank(s) in ") and len(names(directory)) == 2
    alone = train(arguments(material, tmp_path / "alone", **options | {"data_cache": "off", "micro_batch": 2}))[0]
    assert alone["data_from"].startswith("tokenized by every rank for itself in ") and alone["data"] == made["data"]
    before = names(directory)
    monkeypatch.setattr("losia_dist.recipe.run_data.cache.write_part", None)  # nothing is tokenized again
    found = train(arguments(material, tmp_path / "found", **options | {"micro_batch": 2}))[0]
    assert found["data_from"].startswith("found in ") and names(directory) == before
    assert losses(tmp_path / "found") == losses(tmp_path / "alone")
    assert losses(tmp_path / "made") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.parametrize("extra", [{"data_workers": 2}, {"streaming": True}], ids=str)
def test_processes_and_streams_make_the_same_data_set(material, tmp_path, kept, extra):
    options, directory = kept
    plain = train(arguments(material, tmp_path / "plain", **options))[0]
    before = {name: (directory / name / "ids.bin").read_bytes() for name in names(directory)}
    other = tmp_path / "other"
    made = train(arguments(material, tmp_path / "made", **options | {"data_cache": other} | extra))[0]
    made_by = "1 rank(s) of 2 processes" if "data_workers" in extra else "1 rank(s)"
    assert made["data_from"].startswith(f"made by {made_by} in ") and made["data"] == plain["data"]
    assert losses(tmp_path / "made") == losses(tmp_path / "plain")
    assert sorted((other / name / "ids.bin").read_bytes() for name in names(other)) == sorted(before.values())


def test_a_bad_record_in_a_process_of_its_own_is_the_same_error(material, tmp_path, kept, capsys):
    options, directory = kept
    file = tmp_path / "bad.jsonl"
    file.write_text(material["instruction"].read_text() + '{"instruction": "a", "output": 3}\n')
    words = arguments(material, tmp_path / "run", **options, train_file=file, data_workers=2)
    assert "bad.jsonl, line " in (message := refused(capsys, words)) and "'output' must be a string, got int 3." in message
    assert names(directory) == []


def test_a_bad_record_in_the_part_of_one_rank_is_the_same_error_on_all(ranks, material, tmp_path, kept):
    options, directory = kept
    file = tmp_path / "bad.jsonl"
    lines = material["instruction"].read_text().splitlines()
    for line in (30, 35):
        lines[line - 1] = '{"instruction": "a", "output": 3}'
    file.write_text("\n".join(lines))
    found = ranks.errors(2, train, arguments(material, tmp_path / "run", **options, train_file=file))
    assert found[0] == found[1] == ("DataError", f"rank 1 of 2: {file}, line 30: 'output' must be a string, got int 3.")
    assert names(directory) == []


def test_a_directory_that_cannot_be_written_leaves_the_data_in_memory_and_says_so(material, tmp_path, kept):
    options, directory = kept
    directory.write_text("a file")
    summary = train(arguments(material, tmp_path / "run", **options))[0]
    assert "by every rank for itself" in summary["data_from"] and f"({directory} cannot be written: " in summary["data_from"]


def test_positions_that_the_configuration_scales_are_allowed(material):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(material["model"])
    longest = config.max_position_embeddings
    assert run_data.context_length(config) == longest
    for rope, expected in (
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": longest}, 4 * longest),
        ({"rope_type": "linear", "factor": 2.0}, 2 * longest),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": longest // 16}, longest),
    ):
        config.rope_parameters = {**rope, "rope_theta": 10000.0}
        assert run_data.context_length(config) == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({"columns": "question"}, "--columns question: give the file's names and the form's"),
        ({"template_date": "today"}, "--template_date: today: give a day as YYYY-MM-DD"),
        ({"template_date": "2026-03-01"}, "--template_date 2026-03-01 has no effect"),
        ({"chat_template": "absent.jinja"}, "--chat_template absent.jinja cannot be read"),
        ({"data_workers": 0}, "--data_workers 0"),
        ({"data_workers": 2, "data_cache": "off"}, "--data_workers 2 fill the data cache: leave out"),
        ({"streaming": True, "data_cache": "off"}, "--streaming keeps the tokens in the data cache: leave out"),
        ({"streaming": True, "validation_size": 4, "eval_file": None}, "--validation_size 4 needs the number of records"),
        ({"chat_template": "trl"}, "--chat_template trl: TRL has none for this tokenizer's template"),
    ],
)
def test_options_that_cannot_work_are_named(capsys, material, tmp_path, options, words):
    assert words in refused(capsys, arguments(material, tmp_path, **options))
