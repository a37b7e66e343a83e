"""Runs of the script that are lost and go on, on the ranks of the pool: the same weights, and every step logged once."""

import json
import os
import shutil
import signal
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from losia_dist.checkpoint.session import session_of
from losia_dist.cli import main as cli
from losia_dist.errors import ConfigError, DivergenceError
from losia_dist.ranks.interruption import Interrupted
from losia_dist.recipe.checkpoints import Checkpoints
from losia_dist.recipe.engines import PlainRun
from losia_dist.recipe.logs import RunLog
from tests.launch.test_bad_inputs import GOOD, refused
from tests.launch.test_script_engines import losses, train
from tests.support.launching import arguments


def lines_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps_of(directory: Path, name: str = "loss") -> list[int]:
    return [line["step"] for line in lines_of(directory) if name in line]


def complete(directory: Path) -> list[int]:
    found = (directory / "checkpoints").glob("step-*/COMPLETE")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def assert_same_model(ours: Path, theirs: Path, atol: float = 0.0) -> None:
    found, expected = (load_file(directory / "model" / "model.safetensors") for directory in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) if atol == 0 else torch.allclose(found[name], tensor, atol=atol), name


class Lost(Exception):
    """Stands for the end of a process."""


@contextmanager
def after_step(step, do):
    """Something happens to this process after a step of the run."""
    advance = RunLog.advance

    def watched(self, done, **values):
        advance(self, done, **values)
        if done == step:
            do()

    RunLog.advance = watched
    try:
        yield
    finally:
        RunLog.advance = advance


def train_until_lost(words, step):
    def lose():
        raise Lost

    with after_step(step, lose), pytest.raises(Lost):
        train(words)


def train_until_told(words, step, rank):
    """SIGTERM reaches one rank alone, after a step; returns what this rank then said."""

    def tell():
        if not dist.is_initialized() or dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    with after_step(step, tell), pytest.raises(Interrupted) as raised:
        train(words)
    return str(raised.value)


@pytest.mark.slow
def test_sharded_runs_go_on_across_epochs_and_on_one_process(ranks, material, tmp_path):
    """10 steps an epoch; lost in the second one; logs and checkpoints at steps of their own, written in the background."""
    whole, run, alone = (tmp_path / name for name in ("whole", "run", "alone"))
    two = {"sharding": "fsdp2", "micro_batch": 1, "gradient_accumulation": 2}
    shared = {"max_steps": 16, "logging_steps": 4, "eval_steps": 8, "save_steps": 7}
    saved = {**shared, "async_save": True, "resume": "auto"}
    ranks(2, train, arguments(material, whole, **two, **shared))
    ranks(2, train_until_lost, arguments(material, run, **two, **saved), 15)
    assert complete(run) == [7, 14] and steps_of(run) == [4, 8, 12]
    (summary, _), _ = ranks(2, train, arguments(material, run, **two, **saved))
    assert summary["resumed_from_step"] == 14
    assert_same_model(run, whole)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-6)
    assert steps_of(run) == [4, 8, 12, 16] and steps_of(run, "held_out") == [0, 8, 16]

    # From the middle of the first epoch, and of a stretch between two logs, on one process and into another directory.
    words = arguments(material, alone, **{**shared, "micro_batch": 4, "resume": run / "checkpoints" / "step-00000007"})
    summary, _ = train(words)
    assert summary["resumed_from_step"] == 7
    assert losses(alone) == pytest.approx(losses(whole)[1:], abs=1e-5)
    assert_same_model(alone, whole, atol=1e-5)
    assert summary["held_out_loss_before"] == lines_of(whole)[0]["held_out"]
    assert complete(alone) == [14, 16]


def test_ranks_stop_together_where_sigterm_reached_one_of_them(ranks, material, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = arguments(material, run, save_steps=100, resume="auto", eval_file=None)
    first, second = ranks(2, train_until_told, words, 4, 1)
    assert first == second and first.startswith("SIGTERM after step 5 of 8: saved ")
    assert complete(run) == [5]
    ranks(2, train, words)
    ranks(2, train, arguments(material, whole, eval_file=None))
    assert_same_model(run, whole)
    assert losses(run) == losses(whole)


def test_sigterm_ends_one_process_with_its_exit_code_and_a_finished_run_goes_on_to_its_end(capsys, material, tmp_path):
    words = [str(word) for word in arguments(material, tmp_path, micro_batch=4, save_steps=100, resume="auto")]
    before = signal.getsignal(signal.SIGTERM)
    with after_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert cli.train_main(words) == 143
    assert "SIGTERM after step 3 of 8: saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert complete(tmp_path) == [3]
    for _ in range(2):  # the second time there is nothing left to train: the model is written again
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        assert cli.train_main(words) == 0
        assert steps_of(tmp_path) == list(range(1, 9)) and steps_of(tmp_path, "held_out") == [0, 8]
        assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_constant_learning_rate_can_go_on_for_longer(material, tmp_path):
    """Dropout too: its random numbers go on where they stood."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(material["model"], tmp_path / "dropout")
    settings = json.loads((tmp_path / "dropout" / "config.json").read_text())
    (tmp_path / "dropout" / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.3}))
    shared = {"model": tmp_path / "dropout", "micro_batch": 4, "min_lr_ratio": 1, "warmup_ratio": 0.25, "eval_file": None}
    train(arguments(material, run, **shared, max_steps=4, save_steps=2))
    with pytest.raises(ConfigError, match=r"number of steps \(--max_steps, --epochs\) was 4 in the run"):
        train(arguments(material, run, **shared, max_steps=3, save_steps=2, resume=True))
    train(arguments(material, run, **shared, max_steps=6, save_steps=2, resume=True))
    train(arguments(material, whole, **{**shared, "warmup_ratio": 1 / 6}, max_steps=6))
    assert_same_model(run, whole)
    assert losses(run) == losses(whole)


@pytest.fixture(scope="module")
def saved(material, tmp_path_factory):
    """A finished run of 4 steps with checkpoints at 2 and 4."""
    directory = tmp_path_factory.mktemp("saved")
    train(arguments(material, directory, **SAVED))
    return directory


SAVED = {"micro_batch": 4, "max_steps": 4, "save_steps": 2, "no_save": True}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"seed": 1}, "--seed was 0 in the run that saved {saved}/checkpoints/step-00000004, and is 1 now: set it"),
        ({"learning_rate": 1e-3}, "--learning_rate was 0.003 in the run that saved"),
        ({"min_lr_ratio": 0.5}, "--min_lr_ratio was 0.1 in the run"),
        ({"weight_decay": 0.1}, "--weight_decay was 0.0 in the run"),
        ({"max_grad_norm": 0.5}, "--max_grad_norm was 1.0 in the run"),
        ({"precision": "bf16"}, "the precision (--precision) was fp32 in the run"),
        ({"micro_batch": 2}, "the examples per step (--micro_batch x --gradient_accumulation x ranks) was 4"),
        ({"max_steps": 6}, "the number of steps (--max_steps, --epochs) was 4 in the run"),
        ({"warmup_ratio": 0.5}, "the warmup (--warmup_ratio) was 0 in the run"),
        ({"train_file": "changed"}, "the hash of the training examples was"),
        ({"train_file": "instruction_heldout"}, "the count of the training examples was 40 in the run"),
        ({"eval_file": None}, "the count of the held-out examples was 8 in the run that saved {saved}"),
        ({"losia_config": "period"}, "was saved with period=2, and this run has period=3"),
        (
            {"resume": None},
            "--output_dir {saved} holds an earlier run (losia_run.json, metrics.jsonl, subnets.jsonl, summary.json, "
            "tensorboard, checkpoints): go on from it with --resume",
        ),
        ({"resume": "{other}"}, "no complete checkpoint in {other} (the directory does not exist)"),
        ({"output_dir": "{other}"}, "--resume: no complete checkpoint in {other}/checkpoints (the directory does not exist)"),
        ({"losia": None, "losia_config": None}, "--save_steps works with --losia only"),
        ({"losia": None, "losia_config": None, "save_steps": 0}, "--resume works with --losia only"),
        ({"save_steps": -1}, "--save_steps -1: at least 0 is needed"),
        ({"keep_last": 0}, "--keep_last 0: at least 1 is needed"),
        ({"save_steps": 0, "keep_last": 1}, "--keep_last has no effect without --save_steps"),
        ({"save_steps": 0, "async_save": True}, "--async_save has no effect without --save_steps"),
        ({"overwrite": True}, "--overwrite deletes the run that --resume goes on from: leave one of the two out"),
        ({"overwrite": True, "resume": "{saved}"}, "--overwrite would delete --resume {saved}: give another --output_dir"),
        ({"save_steps": 0, "resume": "auto"}, "--resume auto has no effect without --save_steps"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(capsys, material, saved, tmp_path, options, words):
    before = (saved / "metrics.jsonl").read_bytes()
    files = {
        "instruction_heldout": material["instruction_heldout"],
        "changed": tmp_path / "changed.jsonl",
        "period": tmp_path / "period.yaml",
        "{other}": tmp_path / "other",
        "{saved}": saved,
    }
    files["changed"].write_text("\n".join([*material["instruction"].read_text().splitlines()[:39], GOOD]))
    files["period"].write_text(material["losia"].read_text().replace("period: 2", "period: 3"))
    chosen = {name: files.get(value, value) for name, value in options.items()}
    said = refused(capsys, arguments(material, **{"directory": saved, "resume": True, **SAVED, **chosen}))
    assert words.format(saved=saved, other=tmp_path / "other") in said
    assert (saved / "metrics.jsonl").read_bytes() == before and complete(saved) == [2, 4]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_what_moves_is_kept_in_memory_for_saves_that_come_only(material, saved, tmp_path, monkeypatch, elsewhere):
    found, load = [], Checkpoints.load

    def watched(self, run):
        begun = load(self, run)
        found.append(sorted(session_of(run.losia).chains))
        return begun

    monkeypatch.setattr(Checkpoints, "load", watched)
    shutil.copytree(saved, tmp_path / "run")
    directory = tmp_path / ("other" if elsewhere else "run")
    for save_steps in (0, 2):
        options = {**SAVED, "save_steps": save_steps, "resume": tmp_path / "run", "overwrite": elsewhere}
        train(arguments(material, directory, **options))
    assert found == [[], [] if elsewhere else [tmp_path / "run" / "checkpoints"]]


def test_checkpoints_of_another_script_are_refused(capsys, material, saved, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["values"]["extra"] = {"epoch": 3}
        path.write_text(json.dumps(manifest))
        marker = path.with_name("COMPLETE")
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "manifest_crc32": zlib.crc32(path.read_bytes())}))
    words = arguments(material, tmp_path, resume=True, **SAVED)
    assert "was not saved by this script, so its place in the data is not known" in refused(capsys, words)
    # A Trainer's output_dir, or one of its checkpoints: found, and refused for the same reason.
    output = tmp_path / "trainer"
    (output / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "checkpoints").rename(output / "_losia_state")
    (output / "_losia_state" / "step-00000004").rename(output / "_losia_state" / "checkpoint-4")
    for named in (output, output / "checkpoint-4"):
        said = refused(capsys, arguments(material, tmp_path / "new", resume=named, **SAVED))
        assert f"{output}/_losia_state/checkpoint-4 was not saved by this script" in said


def test_other_ranks_and_micro_batches_must_use_the_same_examples(ranks, capsys, material, tmp_path):
    """41 examples: 20 batches of 2 and 10 of 4 leave out the same one; 42 would not."""
    for count, fits in ((41, True), (42, False)):
        data, directory = tmp_path / f"{count}.jsonl", tmp_path / f"run-{count}"
        lines = material["instruction"].read_text().splitlines()
        data.write_text("\n".join([*lines, *[GOOD] * (count - len(lines))]) + "\n")
        options = {
            **SAVED,
            "train_file": data,
            "micro_batch": 2,
            "gradient_accumulation": 2,
            "max_steps": 12,
            "eval_file": None,
        }
        train_until_lost(arguments(material, directory, **options), 11)
        words = arguments(material, directory, **{**options, "resume": True, "gradient_accumulation": 1})
        if fits:
            summaries = ranks(2, train, words)
            assert summaries[0][0]["resumed_from_step"] == 10
        else:
            ((kind, message), other) = ranks.errors(2, train, words)
            assert kind == "ConfigError" and other == (kind, message)
            assert "the examples used in an epoch (those that fill --micro_batch on every rank) was 42" in message


def test_what_has_diverged_is_not_saved(material, tmp_path, monkeypatch):
    step = PlainRun.train_step
    monkeypatch.setattr(
        PlainRun, "train_step", lambda self, batches: step(self, batches) * (float("nan") if self.losia.steps > 2 else 1)
    )
    with pytest.raises(DivergenceError, match="the training loss is nan at step 4"):
        train(arguments(material, tmp_path, micro_batch=4, save_steps=2, logging_steps=8, eval_file=None))
    assert complete(tmp_path) == [2]


def test_no_example_is_read_to_find_the_place_in_the_data(material, saved, monkeypatch):
    """Nor is anything seen twice: the batches of a loader after some are those it would have gone on with."""
    from losia_dist.recipe.loop import _endless

    class Counting(torch.utils.data.Dataset):
        read: list = []

        def __len__(self):
            return 21

        def __getitem__(self, index):
            self.read.append(index)
            return index

    def loader(data):
        sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=1, seed=3, drop_last=True)
        return torch.utils.data.DataLoader(data, 3, sampler=sampler, drop_last=True)

    everything = _endless(loader(Counting()), 0)
    batches = [next(everything).tolist() for _ in range(9)]  # three a epoch
    for done in range(8):
        data = Counting()
        data.read = []
        rest = _endless(loader(data), done)
        assert [next(rest).tolist() for _ in range(9 - done)] == batches[done:]
        assert len(data.read) == 3 * (9 - done)
