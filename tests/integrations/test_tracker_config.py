"""What the Trainer's own trackers know of a run: LoSiA's settings too. TensorBoard is the real one."""

import json
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from tests.support.trainers import fresh_accelerate, trainer_of
from tests.support.training import Run

CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2}
WANTED = {"losia_config/rank_factor": 0.25, "losia_config/period": 2, "losia_config/layers_per_slot": 1}


class Kept(dict):
    """A tracker's configuration of a run, which takes and gives what wandb's and trackio's do."""

    def update(self, values, *, allow_val_change):
        assert allow_val_change  # a run that goes on has told them already
        super().update(values)


class WandbCallback(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self._wandb = SimpleNamespace(config=Kept())


class TrackioCallback(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self._trackio = SimpleNamespace(config=Kept())


class MLflowCallback(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self._ml_flow = SimpleNamespace(log_params=lambda values: setattr(self, "params", values))


class TheirOwn(WandbCallback):
    """A user's subclass."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    boards = [WandbCallback(), TrackioCallback(), MLflowCallback(), TheirOwn()]
    with fresh_accelerate():
        trainer = trainer_of(str(directory), "one", Run(steps=1, config=CONFIG), callbacks=boards, report_to="tensorboard")
        trainer.train()
        trainer.losia.detach()
    return directory, boards


def test_every_tracker_is_told_losias_settings(told):
    wandb, trackio, mlflow, own = told[1]
    for settings in (wandb._wandb.config, trackio._trackio.config, mlflow.params, own._wandb.config):
        assert {name: settings[name] for name in WANTED} == WANTED


def test_tensorboards_run_has_losias_settings_in_its_text(told):
    (events,) = told[0].rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    (text,) = (event.tensor_proto.string_val[0].decode() for event in read.Tensors("losia_config/text_summary"))
    assert all(f"{name}: {value}" in text for name, value in WANTED.items())


def test_a_trainers_memory_is_counted_by_kind(told):
    counted = json.loads((told[0] / "losia_memory.json").read_text())
    assert counted["step"] == 1 and counted["peak"] > sum(counted["held"].values())
    assert min(counted["held"][kind] for kind in ("weights", "trained", "optimizer", "importance")) > 0
