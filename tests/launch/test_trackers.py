"""Where a run's numbers go: TensorBoard, and stand-ins for trackers that are not installed here, with the calls they have."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from losia_dist.cli import main as cli
from losia_dist.recipe import trackers
from tests.launch.test_bad_inputs import refused
from tests.support.launching import arguments


class Board(ModuleType):
    """Has what wandb, trackio and mlflow are asked for, and keeps what they are told."""

    def __init__(self, name):
        super().__init__(name)
        self.about, self.lines, self.finished = {}, [], 0

    def init(self, *, project, name, config, **more):
        self.about, self.project, self.run_name = config, project, name
        return SimpleNamespace(log=lambda values, step: self.lines.append((step, values)), finish=self.end_run)

    def set_experiment(self, name):
        self.project = name

    def start_run(self, run_name):
        self.run_name = run_name

    def log_params(self, values):
        self.about = values

    def log_metrics(self, values, step):
        self.lines.append((step, values))

    def end_run(self):
        self.finished += 1


@pytest.fixture
def boards(monkeypatch):
    made = {name: Board(name) for name in ("wandb", "trackio", "mlflow")}
    for name, board in made.items():
        monkeypatch.setitem(sys.modules, name, board)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: made.get(name))
    return made


def test_every_tracker_gets_the_run_and_its_numbers_and_three_rates_for_all_layers(material, tmp_path, boards, capsys):
    words = arguments(material, tmp_path / "mine", max_steps=3, no_save=True)
    assert cli.train_main([*words, "--report_to", *boards]) == 0
    lines = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    for name, board in boards.items():
        assert (board.project, board.run_name, board.finished) == ("losia_dist", "mine", 1), name
        about = {key: str(value) for key, value in board.about.items()}
        wanted = {"losia_config/period": "2", "losia_config/rank_factor": "0.25", "learning_rate": "0.003"}
        assert wanted.items() <= about.items() and about["engine"] == "one process"
        logged = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert [(step, values["loss"]) for step, values in board.lines if "loss" in values] == logged
        assert [values["held_out"] for _, values in board.lines if "held_out" in values] == [
            line["held_out"] for line in lines if "held_out" in line
        ]
        last = next(values for step, values in board.lines if step == 3 and "loss" in values)
        rates = lines[-2]["learning_rates"]
        assert last["lowest_learning_rate"] == pytest.approx(min(rates), rel=1e-4)
        assert last["highest_learning_rate"] == pytest.approx(max(rates), rel=1e-4)
        assert not [key for key in last if "layers" in key]
    assert boards["wandb"].lines[1][1]["localizing"] == "model.layers.0 .. model.layers.1"
    assert not (tmp_path / "mine" / "tensorboard").exists()  # it was not asked for
    said = capsys.readouterr().out
    assert "step 3/3: loss" in said and "tokens/s, gradient norm" in said and "layers.0 .. model.layers.1" in said


def test_tensorboard_alone_is_told_what_the_run_is(material, tmp_path):
    assert cli.train_main(arguments(material, tmp_path / "run", max_steps=2, no_save=True)) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    assert {"loss", "held_out", "lowest_learning_rate", "mean_learning_rate", "highest_learning_rate"} <= set(names)
    assert not [name for name in names if "layers" in name]
    (text,) = events.Tensors("run/text_summary")
    assert b"losia_config/period: 2" in text.tensor_proto.string_val[0]


def test_a_tracker_that_cannot_be_used_is_refused_before_training(material, tmp_path, capsys, boards, monkeypatch):
    words = arguments(material, tmp_path / "run", max_steps=2)
    assert "give none alone" in refused(capsys, [*words, "--report_to", "none", "wandb"])
    assert "argument --report_to: invalid choice: 'tensor'" in refused(capsys, [*words, "--report_to", "tensor"])

    def no_login(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setattr(boards["wandb"], "init", no_login)
    said = refused(capsys, [*words, "--report_to", "wandb"])
    assert "--report_to wandb: it could not begin: RuntimeError: no API key" in said
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert "--report_to mlflow: it is not installed: pip install mlflow" in refused(capsys, [*words, "--report_to", "mlflow"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_none_writes_no_events(material, tmp_path):
    assert cli.train_main(arguments(material, tmp_path / "run", max_steps=1, no_save=True, report_to="none")) == 0
    assert not (tmp_path / "run" / "tensorboard").exists() and (tmp_path / "run" / "metrics.jsonl").is_file()
