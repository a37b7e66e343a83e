"""`losia-dist export` and `losia-dist apply`, in process: what they write, and their refusals in one line."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from losia_dist import export_model, save_checkpoint
from losia_dist.cli.main import main
from tests.support import resume as runs
from tests.support.models import tiny_llama

RUN = replace(runs.RUN, steps=6, config={**runs.RUN.config, "period": 2})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """base/, a model; run/checkpoints with steps 3 and 6, as the training script leaves them; live/, the model at 6."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("trained")
    tiny_llama(**RUN.model).save_pretrained(directory / "base")
    (directory / "base" / "tokenizer.json").write_text("{}")
    losia, stepper, close = runs.start("one", RUN)
    kept = runs.parts(losia)
    save = lambda done: done % 3 == 0 and save_checkpoint(directory / "run" / "checkpoints", **kept)  # noqa: E731
    runs.train_on(losia, stepper, RUN, RUN.steps, save)
    export_model(losia, directory / "live")
    close()
    return directory


def weights(directory):
    return load_file(directory / "model.safetensors")


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def run(*words) -> int:
    return main([str(word) for word in words])


def refused(capsys, *words) -> str:
    """The one line with which the command line refuses these words, with exit code 2 and nothing on standard output."""
    capsys.readouterr()
    try:
        code = run(*words)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and len(err.splitlines()) == 1 and err.startswith("error: "), (code, out, err)
    return err


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/step-00000006"])
def test_the_newest_checkpoint_of_a_run_becomes_a_plain_model(capsys, trained, tmp_path, named):
    assert run("export", trained / named, tmp_path / "model", "--base_model", trained / "base") == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'model'}\n"
    assert same(weights(tmp_path / "model"), weights(trained / "live"))
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.fixture(scope="module")
def of_trainer(trained, tmp_path_factory):
    """A Trainer's output_dir, by its looks: two of its checkpoints, of which the first has lost its state."""
    output = tmp_path_factory.mktemp("of_trainer")
    shutil.copytree(trained / "run" / "checkpoints", output / "_losia_state")
    (output / "_losia_state" / "step-00000003").rename(output / "_losia_state" / "checkpoint-3")
    (output / "_losia_state" / "step-00000006").rename(output / "_losia_state" / "checkpoint-6")
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-6"):
        (output / name).mkdir()
        (output / name / "trainer_state.json").write_text("{}")
    return output


def test_a_trainers_checkpoints_are_found_by_its_output_dir_and_by_their_own_directories(of_trainer, trained, tmp_path):
    for named in ("", "checkpoint-6"):
        assert run("export", of_trainer / named, tmp_path / f"model{named}") == 0
        assert same(weights(tmp_path / f"model{named}"), weights(trained / "live"))
    assert run("export", of_trainer / "checkpoint-3", tmp_path / "third") == 0
    assert not same(weights(tmp_path / "third"), weights(trained / "live"))


def test_a_trainers_checkpoint_without_state_is_refused_with_those_that_have_it(capsys, of_trainer, tmp_path):
    said = refused(capsys, "export", of_trainer / "checkpoint-2", tmp_path / "model")
    assert f"{of_trainer}/checkpoint-2 is none of the checkpoints whose state is in {of_trainer}/_losia_state" in said
    assert f"(checkpoint-3, checkpoint-6). Give {of_trainer}, for the newest, or one of them." in said


def test_one_step_is_exported_by_its_directory(trained, tmp_path):
    assert run("export", trained / "run" / "checkpoints" / "step-00000003", tmp_path / "model") == 0
    assert not same(weights(tmp_path / "model"), weights(trained / "live"))
    assert not (tmp_path / "model" / "tokenizer.json").exists()


def test_a_delta_and_its_base_are_the_export(capsys, trained, tmp_path):
    base, delta = trained / "base", tmp_path / "run.delta"
    assert run("export", "--delta", trained / "run", delta, "--base_model", base) == 0
    assert run("apply", base, delta, tmp_path / "model") == 0
    assert capsys.readouterr().out == f"written: {delta}\nwritten: {tmp_path / 'model'}\n"
    assert same(weights(tmp_path / "model"), weights(trained / "live"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["export", "{t}/run"], "the following arguments are required: DIRECTORY"),
        (["export", "{t}/nowhere", "{o}/model"], "no complete checkpoint in {t}/nowhere (the directory does not exist)"),
        (["export", "{t}/base", "{o}/model"], "no complete checkpoint in {t}/base: complete there: none at all"),
        (["export", "{t}/run", "{o}/file"], "{o}/file is a file: give a directory for the model"),
        (["export", "{t}/run", "{o}/file/model"], "the model could not be written to {o}/file/model"),
        (["export", "{t}/run", "{o}/model", "--base_model", "{t}/none"], "base model {t}/none is not a directory"),
        (["export", "--delta", "{t}/run", "{o}/delta"], "--delta needs --base_model DIRECTORY"),
        (["export", "--delta", "{t}/run", "{o}", "--base_model", "{t}/base"], "{o} cannot be written: --delta writes one file"),
        (["export", "--delta", "{t}/run", "{o}/no/delta", "--base_model", "{t}/base"], "{o}/no/delta cannot be written"),
        (
            ["export", "--delta", "{t}/run", "{o}/delta", "--base_model", "{t}/run"],
            "{t}/run has no model weights in safetensors",
        ),
        (["apply", "{t}/base", "{o}/none", "{o}/model"], "{o}/none is not a delta of this package"),
        (["apply", "{t}/base", "{t}/live/model.safetensors", "{o}/model"], "is not a delta of this package"),
        (["apply", "{t}/none", "{o}/delta", "{o}/model"], "base model {t}/none is not a directory"),
        (["apply", "{t}/base", "{o}/delta", "{o}/file"], "{o}/file is a file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(capsys, trained, tmp_path, words, said):
    (tmp_path / "file").write_text("")
    assert said.format(t=trained, o=tmp_path) in refused(capsys, *(word.format(t=trained, o=tmp_path) for word in words))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_base_model_is_refused(capsys, trained, tmp_path):
    run("export", "--delta", trained / "run", tmp_path / "delta", "--base_model", trained / "base")
    other = weights(trained / "base")
    other["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert "layers.0.mlp.up_proj" in refused(capsys, "apply", tmp_path / "other", tmp_path / "delta", tmp_path / "model")
    assert not (tmp_path / "model").exists()
