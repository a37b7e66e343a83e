"""launch/train.py under every launcher: one trajectory, one saved model, one log; and what was killed goes on."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from losia_dist.data import build_dataset, load_records
from tests.launch.conftest import RUNS
from tests.launch.test_resume import assert_same_model, complete, steps_of
from tests.support.cases import only, slow
from tests.support.launching import ROOT, arguments, launch

LOSING = str(ROOT / "tests" / "support" / "losing.py")
# `make test` launches these; `make test-full` all.
LAUNCHED = ["one process", "torchrun DDP", "deepspeed ZeRO-3"]
ENGINES = {
    "one process": "one process",
    "torchrun DDP": "ddp",
    "deepspeed ZeRO-2": "deepspeed-zero2",
    "deepspeed ZeRO-3": "deepspeed-zero3",
    "accelerate FSDP2": "fsdp2",
    "accelerate DDP": "ddp",
    "accelerate ZeRO-2": "deepspeed-zero2",
    "accelerate ZeRO-3": "deepspeed-zero3",
    "accelerate one process": "one process",
}


@pytest.mark.parametrize("name", only(LAUNCHED, RUNS.keys()))
def test_every_launcher_gives_the_losses_of_one_process(launched, name):
    run, alone = launched(name), launched("one process")
    assert run.summary["engine"] == ENGINES[name]
    assert run.summary["ranks"] == (1 if "one process" in name else 2)
    assert len(run.values("loss")) == 8
    assert run.values("loss") == pytest.approx(alone.values("loss"), abs=1e-5)
    assert run.values("grad_norm") == pytest.approx(alone.values("grad_norm"), rel=1e-4)
    for key in ("held_out_loss_before", "held_out_loss_after"):
        assert run.summary[key] == pytest.approx(alone.summary[key], abs=1e-5)
    assert run.summary["held_out_loss_after"] < run.summary["held_out_loss_before"] - 0.1


def loss_by_hand(material, directory) -> float:
    """Mean loss per target token over the held-out records, one at a time and without the package's batches."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dataset = build_dataset(load_records(material["instruction_heldout"]), tokenizer, 64)
    total, count = 0.0, 0
    for example in (dataset[index] for index in range(len(dataset))):
        ids, labels = example["input_ids"], example["labels"]
        with torch.no_grad():
            chances = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        for place in range(1, len(ids)):
            if labels[place] != -100:
                total -= chances[place - 1, labels[place]].item()
                count += 1
    return total / count


@pytest.mark.parametrize("name", only(["one process", "torchrun DDP", "deepspeed ZeRO-3"], RUNS.keys()))
def test_the_saved_model_is_the_trained_one(launched, material, name):
    run = launched(name)
    assert loss_by_hand(material, run.directory / "model") == pytest.approx(run.summary["held_out_loss_after"], abs=1e-5)
    assert not [path.name for path in run.directory.rglob("*incomplete*")]


def test_held_out_losses_in_between_do_not_change_the_training(launched):
    run, alone = launched("torchrun DDP"), launched("one process")
    steps = [line["step"] for line in run.metrics if "held_out" in line]
    assert steps == [0, 2, 4, 6, 8]
    assert [line["step"] for line in alone.metrics if "held_out" in line] == [0, 8]
    assert run.values("loss")[-1] == pytest.approx(alone.values("loss")[-1], abs=1e-5)


def test_the_log_holds_every_step_and_tensorboard_shows_the_same(launched):
    run = launched("torchrun DDP")
    lines = [line for line in run.metrics if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        own = {"learning_rates", "peak_memory_gb", "localizing"}
        assert set(line) == {"step", "seconds", "loss", "lr", "tokens_per_second", "grad_norm", *own}
        assert len(line["learning_rates"]) == 4 and max(line["learning_rates"]) <= 1.001 * line["lr"]  # rewarming included
        assert 0.05 < line["peak_memory_gb"] < 20
    slots = ["model.layers.0 .. model.layers.1"] * 2 + ["model.layers.2 .. lm_head"] * 2
    assert [line["localizing"] for line in lines] == slots * 2
    # Linear warmup over a tenth of the steps, then a cosine: the rate that each step was taken with.
    assert [line["lr"] for line in lines[:2]] == [0.0, pytest.approx(3e-3)]
    events = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    shown = [event.value for event in events.Scalars("loss")]
    assert shown == pytest.approx(run.values("loss"), rel=1e-6)
    assert run.output.count("step 8/8: loss") == 1  # one rank reports


@pytest.mark.parametrize("name, count", [("deepspeed ZeRO-3", 2), slow("accelerate one process", 1)])
def test_samples_are_answers_to_the_held_out_prompts(launched, material, name, count):
    first = json.loads(material["instruction_heldout"].read_text().splitlines()[0])
    summary = launched(name).summary
    assert len(summary["samples_before"]) == len(summary["samples_after"]) == count
    assert first["instruction"] in summary["samples_after"][0]["prompt"]
    assert summary["samples_after"][0]["expected"] == first["output"]


# Launches that are lost and go on


def curve(directory: Path, name: str = "loss") -> list[int]:
    """Steps of a TensorBoard curve."""
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def assert_continued(run, whole) -> None:
    """A launch that went on from step 3 after its loss at step 5, held against one that nothing happened to."""
    assert run.code == 0, run.output[-4000:]
    assert "step-00000003, after step 3 of 8" in run.output
    assert_same_model(run.directory, whole.directory)
    assert [(line["step"], line.get("loss"), line.get("held_out")) for line in run.metrics] == [
        (line["step"], line.get("loss"), line.get("held_out")) for line in whole.metrics
    ]
    seconds = run.values("seconds")
    assert seconds == sorted(seconds)
    assert curve(run.directory) == list(range(1, 9))
    for name in ("held_out_loss_before", "held_out_loss_after", "samples_before", "samples_after", "train_loss", "tokens"):
        assert run.summary[name] == whole.summary[name], name
    assert run.summary["training_seconds"] > seconds[2] / 2
    assert complete(run.directory) == [6, 8]


LOST = ["one process", "torchrun DDP", "deepspeed ZeRO-2", "deepspeed ZeRO-3", "accelerate FSDP2"]


@pytest.mark.parametrize("name", only(["one process"], LOST))
def test_a_killed_launch_goes_on_with_the_same_command_line(launched, material, tmp_path, name):
    whole = launched(name)
    launcher, options = RUNS[name]
    words = arguments(material, tmp_path, **options, save_steps=3, keep_last=2, resume="auto")
    killed = launch(
        [*launcher, LOSING], words, tmp_path, LOSE_STEP="5", LOSE_RANK="0" if name == "one process" else "1", LOSE_BY="SIGKILL"
    )
    assert killed.code != 0 and not (tmp_path / "summary.json").exists()
    assert complete(tmp_path) == [3]
    assert steps_of(tmp_path)[-1] >= 4
    assert_continued(launch(launcher, words, tmp_path), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun DDP", "deepspeed ZeRO-2"])
def test_a_launcher_that_is_told_to_end_leaves_a_checkpoint(launched, material, tmp_path, name):
    whole = launched(name)
    launcher, options = RUNS[name]
    words = arguments(material, tmp_path, **options, save_steps=100, resume="auto")
    ended = launch([*launcher, LOSING], words, tmp_path, LOSE_STEP="3", LOSE_RANK="0", LOSE_BY="SIGTERM")
    assert ended.code != 0 and not ended.own_traceback
    assert ended.output.count("SIGTERM after step") == 1, ended.output[-3000:]
    (step,) = complete(tmp_path)
    assert 3 <= step < 8 and steps_of(tmp_path) == list(range(1, step + 1))
    run = launch(launcher, words, tmp_path)
    assert run.code == 0, run.output[-4000:]
    assert_same_model(tmp_path, whole.directory)
    assert steps_of(tmp_path) == list(range(1, 9))
