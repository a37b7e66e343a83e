"""A second run into one --output_dir: refused, or it replaces what the script wrote, and nothing else."""

import shutil

import pytest
from filelock import FileLock

from losia_dist.cli import main as cli
from losia_dist.recipe.logs import RunLog
from tests.launch.test_bad_inputs import refused
from tests.launch.test_resume import Lost, complete, steps_of, train_until_lost
from tests.launch.test_script_engines import train
from tests.support.launching import arguments

SHORT = {"micro_batch": 4, "max_steps": 2, "eval_file": None}


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def first(material, tmp_path_factory):
    """A finished run with everything that the script writes, and somebody's notes in every directory."""
    directory = tmp_path_factory.mktemp("first")
    train(arguments(material, directory, **SHORT, save_steps=2))
    for path in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        (path / "notes.txt").write_text("mine")
        (path / "mine.json").write_text("{}")
    return directory


@pytest.fixture
def earlier(first, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "left", ["losia_run.json", "metrics.jsonl", "summary.json", "tensorboard", "model", "checkpoints"], ids=str
)
def test_anything_of_an_earlier_run_is_refused_before_anything_is_read(capsys, material, earlier, tmp_path, left):
    (tmp_path / "new").mkdir()
    (earlier / left).rename(tmp_path / "new" / left)
    (tmp_path / "new" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "new")
    said = refused(capsys, arguments(material, tmp_path / "new", **SHORT, model="./absent"))
    assert f"holds an earlier run ({left}): " in said and "another --output_dir" in said and "--overwrite" in said
    assert ("with --resume, " in said) == (left == "checkpoints")
    assert contents(tmp_path / "new") == before


def test_full_fine_tuning_is_refused_too(capsys, material, earlier):
    words = arguments(material, earlier, **SHORT, losia=None, losia_config=None)
    assert "holds an earlier run (losia_run.json, metrics.jsonl" in refused(capsys, words)


@pytest.mark.parametrize("words", [{"resume": "auto", "save_steps": 2}, {"overwrite": True}], ids=str)
def test_while_a_run_writes_no_other_does(capsys, material, earlier, words):
    with FileLock(earlier / ".lock"):  # as the other run's first rank has it
        before = contents(earlier)
        assert "another run is writing there now" in refused(capsys, arguments(material, earlier, **SHORT, **words))
        assert contents(earlier) == before


def test_files_of_others_are_in_nobodys_way(material, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "slurm.log").write_text("mine")
    train(arguments(material, tmp_path, **SHORT, no_save=True))
    assert (tmp_path / "slurm.log").read_text() == "mine"


def test_overwrite_replaces_what_the_script_wrote_and_keeps_every_other_file(material, earlier):
    notes = {path for path in contents(earlier) if path.name in ("notes.txt", "mine.json")}
    train(arguments(material, earlier, **{**SHORT, "max_steps": 1}, no_save=True, overwrite=True))
    assert steps_of(earlier) == [1] and len(list((earlier / "tensorboard").glob("events*"))) == 1
    new = {"losia_run.json", "losia_config.json", "metrics.jsonl", "subnets.jsonl", "summary.json", "losia_memory.json"}
    left = {str(path) for path in contents(earlier).keys() - notes if path.parent.name != "tensorboard"}
    assert left == new
    assert notes <= contents(earlier).keys()


def test_a_model_that_is_written_again_knows_its_files(material, tmp_path):
    for number in range(3):
        train(arguments(material, tmp_path, **SHORT, overwrite=number > 0))
        assert (tmp_path / "model" / "model.safetensors").is_file()
        if number == 0:
            (tmp_path / "model" / "old.safetensors").write_text("mine")
    assert (tmp_path / "model" / "old.safetensors").read_text() == "mine"
    train(arguments(material, tmp_path, **SHORT, overwrite=True, no_save=True))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old.safetensors"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"train_file": "./absent.jsonl"}, "no such file"),
        ({"model": "./absent"}, "no model and tokenizer could be read"),
        ({"max_length": 512}, "is above the model's context"),
        ({"model": "{run}/model"}, "--overwrite would delete --model {run}/model: give another --output_dir"),
        ({"train_file": "{run}/model/notes.txt"}, "--overwrite would delete --train_file {run}/model/notes.txt"),
        ({"train_file": "{run}/m*/*.txt"}, "--overwrite would delete --train_file {run}/m*/*.txt"),
        (
            {"train_file": "{run}/model[:5]:0.5"},
            "--overwrite would delete --train_file {run}/model[:5]:0.5",
        ),
        ({"resume": "{run}"}, "--overwrite would delete --resume {run}"),
    ],
)
def test_nothing_is_lost_by_a_bad_input(capsys, material, earlier, options, words):
    before = contents(earlier)
    options = {name: str(value).format(run=earlier) if isinstance(value, str) else value for name, value in options.items()}
    assert words.format(run=earlier) in refused(capsys, arguments(material, earlier, **SHORT, overwrite=True, **options))
    assert contents(earlier) == before


@pytest.mark.parametrize(
    "gone, words",
    [("losia_run.json", "were not written by this script"), ("model_files.json", "is this script's is not known")],
)
def test_what_may_be_somebody_elses_is_not_overwritten(capsys, material, earlier, gone, words):
    (earlier / gone).unlink()
    before = contents(earlier)
    assert words in refused(capsys, arguments(material, earlier, **SHORT, overwrite=True))
    assert contents(earlier) == before


def test_names_that_lead_out_of_the_model_are_not_followed(material, earlier):
    (earlier / "model_files.json").write_text('["../notes.txt", "/etc/hostname", "model.safetensors"]')
    train(arguments(material, earlier, **SHORT, no_save=True, overwrite=True))
    assert (earlier / "notes.txt").is_file() and not (earlier / "model" / "model.safetensors").exists()


def test_a_restart_of_torchrun_does_not_overwrite_its_own_run(capsys, material, earlier, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "torchrun has started this run again" in refused(capsys, arguments(material, earlier, **SHORT, overwrite=True))


def test_a_start_that_was_lost_before_its_first_checkpoint_begins_anew(material, tmp_path):
    words = arguments(material, tmp_path, micro_batch=4, max_steps=3, eval_file=None, save_steps=3, resume="auto")
    for lose_at in ("start", 2):
        if lose_at == "start":
            begin, RunLog.follow = RunLog.follow, lambda *_: (_ for _ in ()).throw(Lost)
            try:
                with pytest.raises(Lost):
                    train(words)
            finally:
                RunLog.follow = begin
        else:
            train_until_lost(words, lose_at)
        assert complete(tmp_path) == []
    train(words)
    assert steps_of(tmp_path) == [1, 2, 3] and complete(tmp_path) == [3]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_resume_auto_does_not_begin_anew_over_a_finished_run(capsys, material, tmp_path):
    train(arguments(material, tmp_path, **SHORT))
    before = contents(tmp_path)
    said = refused(capsys, arguments(material, tmp_path, **SHORT, save_steps=1, resume="auto"))
    assert "holds an earlier run" in said and "--resume, give" not in said
    assert contents(tmp_path) == before


def test_export_after_a_run_without_checkpoints_says_where_the_model_is(capsys, material, tmp_path):
    train(arguments(material, tmp_path / "run", **SHORT))
    for words in (["export", tmp_path / "run", tmp_path / "out"], ["export", "--delta", tmp_path / "run", tmp_path / "d"]):
        words += ["--base_model", material["model"]]
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "none at all" not in said
        assert "--save_steps" in said and f"trained model is in {tmp_path}/run/model, a plain Transformers directory" in said
