"""train(resume_from_checkpoint=...): the resumed run is the run, and what cannot be resumed from says so at once."""

import json
import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from losia_dist import (
    LoSiAAdamW,
    LoSiACallback,
    LoSiAConfig,
    LoSiATrainerMixin,
    export_model,
    get_losia_model,
    losia_parameter_groups,
)
from losia_dist.checkpoint import layout
from losia_dist.checkpoint.session import session_of
from losia_dist.errors import CheckpointError, UnsupportedError
from tests.support.cases import grid
from tests.support.compare import assert_same_run
from tests.support.models import tiny_llama
from tests.support.resume import everything
from tests.support.trainers import Recorder, arguments, close, examples, fresh_accelerate, result_of, trainer_of
from tests.support.training import Run
from tests.support.trl_models import conversations, preferences, save_tiny_model

RUN = Run(steps=9, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3, "train_norms": True})
# Slots end at 3, 6 and 9; the group that moved at 3 rewarms until 6. The data's first epoch ends with step 5.
REWARMING_IN_A_SLOT, END_OF_THE_EPOCH, END_OF_A_SLOT = 4, 5, 6
STATE = "_losia_state"


class At(TrainerCallback):
    """Saves after some steps, and stops after one."""

    def __init__(self, save=(), stop=None):
        self.save, self.stop = save, stop

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.save
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop


def train(directory, engine, run=RUN, *, resume=None, save=(), stop=None, epoch=5, disturb=False, **changes):
    """One process's life, with epochs of `epoch` steps; with `disturb` the model starts elsewhere than usual."""
    with fresh_accelerate():
        recorder = Recorder()
        shuffled = {
            "train_sampling_strategy": "random",
            "bf16": run.dtype == "bf16",
            "save_strategy": "steps",
            "save_steps": 10**6,
        }
        trainer = trainer_of(str(directory), engine, run, callbacks=[recorder, At(save, stop)], **{**shuffled, **changes})
        recorder.trainer = trainer
        trainer.train_dataset = trainer.train_dataset[: epoch * run.batch * run.accumulation]
        if disturb:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 10)
        trainer.train(resume_from_checkpoint=resume)
        result = result_of(trainer) | {"history": recorder.history, "steps": trainer.losia.steps}
        result |= {"everything": everything(trainer.losia), "random": torch.get_rng_state(), "best": trainer.state.best_metric}
        result["engine steps"] = trainer.deepspeed.global_steps if trainer.is_deepspeed_enabled else None
        result["collects for"] = [path.name for path in session_of(trainer.losia).chains]
        close(trainer)
        return result


def run_on(ranks, engine, directory, *args, **settings):
    if engine == "one":
        return [train(directory, engine, *args, **settings)]
    return ranks(2, train, directory, engine, *args, **settings)


def steps_of(result):
    """What was logged of each step: loss, gradient norm, learning rates, localizing group, epoch."""
    # What the process has held at most is its own, and not the run's.
    entries = [entry for entry in result["log"] if "loss" in entry]
    return [{name: value for name, value in entry.items() if name != "losia/peak_memory_gb"} for entry in entries]


def assert_equal(resumed, undisturbed):
    for ours, theirs in zip(resumed, undisturbed, strict=True):
        assert steps_of(ours) == steps_of(theirs)
        assert ours["engine steps"] == theirs["engine steps"]
        assert ours["steps"] == theirs["steps"] == len(steps_of(theirs))
        assert ours["everything"].keys() == theirs["everything"].keys()
        different = [n for n, tensor in theirs["everything"].items() if not torch.equal(tensor, ours["everything"][n])]
        assert different == []
        assert torch.equal(ours["random"], theirs["random"])


CASES = grid(["one", "ddp", "zero2", "zero3", "fsdp2"], ["fp32", "bf16"], often=["one-fp32", "one-bf16", "zero2-fp32"])


@pytest.mark.parametrize("engine, dtype", CASES)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(ranks, tmp_path, engine, dtype):
    run = replace(RUN, dtype=dtype, max_grad_norm=0.5)
    undisturbed = run_on(ranks, engine, tmp_path, run, save=(REWARMING_IN_A_SLOT,))
    # The resumed run saves in its turn, at the end of a slot, and is resumed from.
    for step in (REWARMING_IN_A_SLOT, END_OF_A_SLOT):
        name = str(tmp_path / f"checkpoint-{step}")
        assert_equal(run_on(ranks, engine, tmp_path, run, resume=name, save=(END_OF_A_SLOT,), disturb=True), undisturbed)


DROPOUT = replace(RUN, accumulation=2, max_grad_norm=0.5, model={"attention_dropout": 0.2})


@pytest.mark.parametrize("engine", ["one", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ddp", "zero3"))])
def test_with_dropout_and_accumulation_random_numbers_go_on_too(ranks, tmp_path, engine):
    saves = (REWARMING_IN_A_SLOT, END_OF_THE_EPOCH)
    undisturbed = run_on(ranks, engine, tmp_path, DROPOUT, save=saves)
    for step in saves:
        name = str(tmp_path / f"checkpoint-{step}")
        assert_equal(run_on(ranks, engine, tmp_path, DROPOUT, resume=name), undisturbed)


def test_a_run_that_was_stopped_goes_on_from_the_newest_checkpoint_and_saving_changes_nothing(tmp_path):
    undisturbed = train(tmp_path / "other", "one")
    stopped = train(tmp_path, "one", save=(3, 7), stop=7)
    assert stopped["losses"] == undisturbed["losses"][:7]
    assert_equal([train(tmp_path, "one", resume=True, disturb=True)], [undisturbed])
    assert sorted(path.name for path in (tmp_path / STATE).glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-7"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    """Start scripts resume whatever is there."""
    finished = train(tmp_path, "one", save=(9,))  # in the middle of an epoch, where the Trainer itself would add a step
    again = train(tmp_path, "one", resume=True, disturb=True)
    assert_equal([again | {"random": finished["random"]}], [finished])  # no random numbers are needed any more


def test_data_shuffled_by_the_global_random_numbers_comes_in_the_same_order(tmp_path):
    unseeded = {"accelerator_config": {"use_seedable_sampler": False}, "epoch": 9}
    undisturbed = train(tmp_path, "one", DROPOUT, save=(4,), **unseeded)
    assert_equal([train(tmp_path, "one", DROPOUT, resume=True, **unseeded)], [undisturbed])


def test_the_directory_may_be_spelled_otherwise_and_the_plain_model_is_not_read(saved, tmp_path, monkeypatch):
    directory = copied(saved, tmp_path)
    (directory / "checkpoint-4" / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    resumed = train(directory, "one", resume="run/../run/checkpoint-4/", save=(6,))
    assert_equal([train(directory, "one", resume=True)], [resumed])
    assert {path.name for path in (directory / STATE).glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4", "checkpoint-6"}


def test_a_run_that_goes_on_elsewhere_collects_nothing_for_the_place_it_came_from(saved, tmp_path):
    name = str(saved / "checkpoint-4")
    assert train(tmp_path, "one", resume=name)["collects for"] == []
    assert train(tmp_path, "one", resume=name, save=(5,))["collects for"] == [STATE]
    assert train(saved, "one", resume=name, save_only_model=True)["collects for"] == []


@pytest.mark.slow
def test_an_optimizer_and_a_scheduler_of_the_deepspeed_configuration_are_restored(ranks, tmp_path):
    auto = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": 0.0, "torch_adam": True}
    rising = {"warmup_min_lr": 0.0, "warmup_max_lr": "auto", "warmup_num_steps": 6, "warmup_type": "linear"}
    named = {"optimizer": {"type": "AdamW", "params": auto}, "scheduler": {"type": "WarmupLR", "params": rising}}
    run = replace(RUN, deepspeed=named)
    undisturbed = ranks(2, train, tmp_path, "zero2", run, save=(4,), warmup_steps=6)
    assert len({entry["learning_rate"] for entry in steps_of(undisturbed[0])}) > 4
    assert_equal(ranks(2, train, tmp_path, "zero2", run, resume=True, warmup_steps=6, disturb=True), undisturbed)


def train_with_trl(kind, model, directory, resume=None, stop=None):
    trainer_class, config_class, data = {
        "sft": (LoSiASFT, SFTConfig, conversations),
        "dpo": (LoSiADPO, DPOConfig, preferences),
    }[kind]
    with fresh_accelerate():
        settings = {
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "max_steps": 8,
        }
        settings |= {"dataloader_pin_memory": False, "learning_rate": 5e-3, "save_steps": 4, "per_device_train_batch_size": 4}
        trainer = trainer_class(
            model=model,
            args=config_class(output_dir=str(directory), **settings),
            train_dataset=Dataset.from_list(data(24)),
            losia_config=LoSiAConfig(rank_factor=0.5, period=3),
            callbacks=[At(save=(5,), stop=stop)],
        )
        trainer.train(resume_from_checkpoint=resume)
        result = result_of(trainer) | {"steps": trainer.losia.steps, "engine steps": None}
        result |= {"everything": everything(trainer.losia), "random": torch.get_rng_state()}
        close(trainer)
        return result


class LoSiASFT(LoSiATrainerMixin, SFTTrainer):
    pass


class LoSiADPO(LoSiATrainerMixin, DPOTrainer):
    pass


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_trls_trainers_resume_too(tmp_path, kind):
    model = save_tiny_model(tmp_path / "model")
    undisturbed = train_with_trl(kind, model, tmp_path / "whole")
    train_with_trl(kind, model, tmp_path / "cut", stop=5)
    resumed = train_with_trl(kind, model, tmp_path / "cut", resume=True)
    for entry in [*resumed["log"], *undisturbed["log"]]:
        entry.pop("num_tokens", None)  # TRL counts anew in each process
    assert_equal([resumed], [undisturbed])


@pytest.mark.slow
def test_two_ranks_go_on_as_one_process_and_the_other_way_round(ranks, tmp_path):
    together = ranks(2, train, tmp_path, "ddp", save=(REWARMING_IN_A_SLOT,))[0]
    name = str(tmp_path / f"checkpoint-{REWARMING_IN_A_SLOT}")
    alone = train(tmp_path / "other", "one", replace(RUN, batch=2, accumulation=2), resume=name, disturb=True)
    assert [entry["step"] for entry in steps_of(alone)] == list(range(1, 10))
    moved = [entry for entry in together["history"] if entry[0] >= REWARMING_IN_A_SLOT]
    assert_same_run(alone, together | {"history": moved})
    saved = train(tmp_path / "third", "one", save=(END_OF_A_SLOT,))
    for result in ranks(2, train, tmp_path / "fourth", "fsdp2", resume=str(tmp_path / "third" / "checkpoint-6"), disturb=True):
        assert_same_run(result, saved | {"history": [entry for entry in saved["history"] if entry[0] >= END_OF_A_SLOT]})


def test_states_are_rotated_with_the_checkpoints_and_each_that_stays_can_be_resumed_from(tmp_path):
    undisturbed = train(tmp_path, "one", save=range(1, 9), save_total_limit=2)
    states = tmp_path / STATE
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]
    assert sorted(path.name for path in states.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]
    assert_equal([train(tmp_path, "one", resume=str(tmp_path / "checkpoint-7"), disturb=True)], [undisturbed])
    # The state, too, is a checkpoint of this package: it exports to what the Trainer wrote beside it.
    export_model(states / "checkpoint-7", tmp_path / "exported")
    ours, theirs = (LlamaForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("exported", "checkpoint-7"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_state_that_later_ones_build_on_outlives_its_checkpoint(tmp_path, monkeypatch):
    def rotate(output_dir, **settings):  # as the Trainer's does where times of files cannot be trusted
        shutil.rmtree(tmp_path / "checkpoint-4", ignore_errors=True)

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    undisturbed = train(tmp_path, "one", save=(2, 4, 7))  # the save after step 4 keeps what moved since the first one
    assert sorted(path.name for path in (tmp_path / STATE).glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-7"]
    assert_equal([train(tmp_path, "one", resume=True, disturb=True)], [undisturbed])


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the first evaluation's: the loss falls
    "save_steps": 2,
    "save_total_limit": 1,
}


@pytest.mark.parametrize("engine", ["one", pytest.param("zero3", marks=pytest.mark.slow)])
def test_the_best_model_from_before_the_interruption_comes_back_at_the_end(ranks, tmp_path, engine):
    run = replace(RUN, steps=8)
    settings = {"epoch": 8, **BEST}
    undisturbed = run_on(ranks, engine, tmp_path / "whole", run, save=(2, 4, 6, 8), **settings)
    stopped = {**settings, "load_best_model_at_end": False, "save_total_limit": 2}
    run_on(ranks, engine, tmp_path / "cut", run, save=(2, 4), stop=4, **stopped)
    assert {path.name for path in (tmp_path / "cut" / STATE).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    resumed = run_on(ranks, engine, tmp_path / "cut", run, save=(6, 8), resume=True, **settings)
    for ours, theirs in zip(resumed, undisturbed, strict=True):
        assert ours["best"] == theirs["best"] == theirs["log"][2]["eval_loss"]
        best = LlamaForCausalLM.from_pretrained(tmp_path / "cut" / "checkpoint-2").state_dict()
        for name, weight in theirs["weights"].items():
            assert torch.equal(ours["weights"][name], weight), name
            assert torch.equal(best[name], weight), name
    assert {path.name for path in (tmp_path / "cut" / STATE).glob("checkpoint-*")} == {"checkpoint-2"}


def test_true_takes_the_newest_checkpoint_that_is_whole_and_says_what_it_passed_over(tmp_path, caplog):
    undisturbed = train(tmp_path, "one", save=(3, 5, 7, 8))
    (tmp_path / STATE / "checkpoint-8" / layout.COMPLETE).unlink()
    shutil.rmtree(tmp_path / STATE / "checkpoint-7")
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"global_')
    with caplog.at_level(logging.WARNING):
        assert_equal([train(tmp_path, "one", resume=True, disturb=True)], [undisturbed])
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert [line.partition(":")[2].split(":")[0].strip() for line in told] == ["checkpoint-8", "checkpoint-7", "checkpoint-5"]
    assert all(line.endswith("Resuming from checkpoint-3.") for line in told)


def attempt(directory, changes):
    run = replace(RUN, **changes.pop("run", {}))
    return train(directory, changes.pop("engine", "ddp"), run, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stopped run of one process."""
    directory = tmp_path_factory.mktemp("saved")
    train(directory, "one", save=(3, 4), stop=4)
    return directory


def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"resume": "absent/checkpoint-4"}, "resume_from_checkpoint='absent/checkpoint-4': there is no such directory"),
        (
            {"resume": "no-state"},
            "checkpoint-3.*model only.*save_only_model=True.*complete there: checkpoint-4.*from_pretrained",
        ),
        ({"resume": "checkpoint-4", "run": {"config": {**RUN.config, "period": 2}}}, "saved with period=3.*has period=2"),
        ({"resume": "checkpoint-4", "run": {"model": {"hidden_size": 48}}}, "another model, rank factor or precision"),
        ({"resume": "checkpoint-4", "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "holds a LambdaLR"),
        ({"resume": None}, r"holds the checkpoints of another run \(checkpoint-4 ...\).*another output_dir, or delete"),
    ],
)
def test_what_cannot_be_resumed_is_refused_on_every_rank_with_the_fix(ranks, saved, tmp_path, changes, words):
    directory, changes = copied(saved, tmp_path), dict(changes)
    if changes["resume"] == "no-state":
        shutil.rmtree(directory / STATE / "checkpoint-3")
        changes["resume"] = "checkpoint-3"
    if changes["resume"] is not None and "/" not in changes["resume"]:
        changes["resume"] = str(directory / changes["resume"])
    failures = ranks.errors(2, attempt, directory, changes)
    assert failures[0] == failures[1]
    assert failures[0][0] == "CheckpointError"
    assert re.search(words, failures[0][1]), failures[0][1]


def test_checkpoints_of_the_model_alone_are_refused_and_none_at_all_is_the_trainers_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        (tmp_path / "empty").mkdir()
        train(tmp_path / "empty", "one", resume=True)
    train(tmp_path, "one", save=(2,), stop=2, save_only_model=True)
    assert not (tmp_path / STATE).exists()
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be resumed from. checkpoint-2: .*save_only_model=True"):
        train(tmp_path, "one", resume=True)


def test_a_damaged_state_is_refused_before_anything_changes(saved, tmp_path):
    directory = copied(saved, tmp_path)
    file = next((directory / STATE / "checkpoint-4").glob("state-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"state-00000.safetensors is damaged.*load another step"):
        train(directory, "one", resume=True)


def test_a_state_written_for_a_checkpoint_that_was_cut_off_makes_no_pair_with_an_older_one(saved, tmp_path, monkeypatch):
    directory = copied(saved, tmp_path)

    def fail(*args, **kwargs):
        raise OSError("the wire was cut")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="the wire was cut"):
        patched.setattr("transformers.trainer_callback.TrainerState.save_to_json", fail)
        train(directory, "one", resume=str(directory / "checkpoint-3"), save=(4,))
    assert not (directory / "checkpoint-4" / "trainer_state.json").exists()
    resumed = train(directory, "one", resume=True)
    assert [entry["step"] for entry in steps_of(resumed)] == list(range(1, 10))


def test_the_callback_in_a_plain_trainer_refuses_to_resume(saved, tmp_path):
    config = LoSiAConfig(**RUN.config)
    with fresh_accelerate(), pytest.raises(UnsupportedError, match="no subnet of it.*LoSiATrainer"):
        model = get_losia_model(tiny_llama(), config)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3))
        args = arguments(str(tmp_path), RUN)
        callbacks = [LoSiACallback(config)]
        trainer = Trainer(model, args, train_dataset=examples(RUN), optimizers=(optimizer, None), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-4"))


def test_uploads_of_the_checkpoints_alone_are_refused(tmp_path):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(UnsupportedError, match=f"hub_strategy='{strategy}'.*'every_save' or 'end'"):
            train(tmp_path, "one", push_to_hub=True, hub_strategy=strategy)


def test_the_trainers_own_files_say_where_the_run_stood(saved):
    state = json.loads((saved / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["global_step"], len(state["log_history"])) == (4, 4)
    assert not list((saved / "checkpoint-4").glob("*.pt*"))
