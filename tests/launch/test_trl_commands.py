"""`losia-dist dpo`, `kto`, `reward`, `grpo`: TRL's trainers from the command line, on a tiny model."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from losia_dist.cli.main import main
from losia_dist.integrations.trainer.trainer import LoSiATrainerMixin
from losia_dist.recipe.trl.rewards import answer_in
from tests.support.cases import slow
from tests.support.trainers import fresh_accelerate
from tests.support.trl_models import WORDS, preferences, save_tiny_model

SETTINGS = json.dumps({"rank_factor": 0.5, "period": 2})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and data of every kind."""
    directory = tmp_path_factory.mktemp("place")
    save_tiny_model(directory / "model")
    pairs = preferences(8)
    judged = [{"prompt": one["prompt"], "completion": one["chosen"], "label": True} for one in pairs]
    judged += [{"prompt": one["prompt"], "completion": one["rejected"], "label": False} for one in pairs]
    asked = [{"prompt": one["prompt"], "wanted": WORDS[place]} for place, one in enumerate(pairs)]
    for name, rows in (("pairs", pairs), ("judged", judged), ("asked", asked)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "rewards_of_a_test.py").write_text(
        "def share(completions, wanted, **_):\n    return [text.count(word) / 4 for text, word in zip(completions, wanted)]\n"
    )
    return directory


def run(kind, place, target, *words):
    options = {"model": place / "model", "output_dir": target, "losia_config": SETTINGS, "max_steps": 3, "logging_steps": 1}
    options |= {"per_device_train_batch_size": 2, "learning_rate": 5e-3, "report_to": "none", "save_strategy": "no"}
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with fresh_accelerate():
        return main([kind, *given, *map(str, words)])


DATA = {"dpo": "pairs", "kto": "judged", "reward": "pairs"}


@pytest.mark.parametrize("kind", ["dpo", slow("kto"), slow("reward")])
def test_preferences_train_a_plain_model(place, tmp_path, kind):
    assert run(kind, place, tmp_path / "out", "--train_file", place / f"{DATA[kind]}.jsonl") == 0
    load = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    trained = load.from_pretrained(tmp_path / "out").state_dict()
    base = load_file(place / "model" / "model.safetensors")
    moved = {name for name, weight in base.items() if name in trained and not torch.equal(trained[name], weight)}
    assert moved == {name for name in base if name.endswith("_proj.weight")}
    assert (tmp_path / "out" / "README.md").is_file()
    if kind == "reward":
        assert trained["score.weight"].abs().sum() > 0


@pytest.mark.slow
def test_grpo_rewards_by_a_function_of_the_users(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words = ["--train_file", place / "asked.jsonl", "--reward", "rewards_of_a_test:share", "--num_generations", 2]
    assert run("grpo", place, tmp_path / "out", *words, "--max_completion_length", 4) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


class Problems(list):
    """Stands in for a task of reasoning-gym."""

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


def test_a_task_of_reasoning_gym_brings_problems_and_their_scores(place, tmp_path, monkeypatch):
    gym = ModuleType("reasoning_gym")
    asked = []

    def create_dataset(name, size, seed, **settings):
        if name != "echo":
            raise ValueError(f"Dataset '{name}' not registered")
        asked.append((size, seed, settings))
        return Problems({"question": word, "answer": word} for word in WORDS[:size])

    gym.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    seen = {}
    monkeypatch.setattr(LoSiATrainerMixin, "train", lambda self, **_: seen.update(trainer=self))
    monkeypatch.setattr(LoSiATrainerMixin, "save_model", lambda self: None)
    words = ["--task", "echo", "--task_settings", '{"easy": true}', "--task_size", 6, "--num_generations", 2, "--seed", 5]
    assert run("grpo", place, tmp_path / "out", *words) == 0
    assert asked == [(6, 5, {"easy": True})]
    trainer = seen["trainer"]
    row = trainer.train_dataset[3]
    assert row["prompt"][0]["content"] == WORDS[3]
    said = [[{"role": "assistant", "content": text}] for text in (f"so\n{WORDS[3]}", "no", f"<answer>{WORDS[3]}</answer> ok")]
    assert trainer.reward_funcs[0](completions=said, place=[3, 3, 3]) == [1.0, 0.0, 1.0]


def test_the_answer_is_what_stands_in_tags_or_in_the_last_line():
    assert [answer_in(text) for text in ("a\n b \n", "<answer> 7 </answer>x", "<answer>8", "")] == ["b", "7", "8", ""]


@pytest.mark.parametrize(
    "kind, words, said",
    [
        ("dpo", ["--train_file", "{place}/judged.jsonl"], "judged.jsonl, line 1: losia-dist dpo needs chosen, rejected"),
        ("grpo", ["--train_file", "{place}/asked.jsonl"], "needs problems and a reward"),
        ("grpo", ["--train_file", "{place}/asked.jsonl", "--reward", "nowhere:f"], "--reward nowhere:f: No module named"),
        ("grpo", ["--train_file", "{place}/asked.jsonl", "--reward", "json"], "give MODULE:FUNCTION"),
        ("grpo", ["--task", "x", "--reward", "a:b"], "brings data and a reward of its own"),
        ("grpo", ["--task", "x"], "needs reasoning-gym: pip install"),
        ("kto", ["--train_file", "{place}/judged.jsonl", "--fp16", "True"], "fp16"),
        ("dpo", ["--train_file", "{place}/pairs.jsonl", "--betas", "1"], "unrecognized arguments: --betas"),
    ],
)
def test_what_cannot_work_is_one_line(place, tmp_path, capsys, monkeypatch, kind, words, said):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    capsys.readouterr()
    try:
        code = run(kind, place, tmp_path / "out", *[word.format(place=place) for word in words])
    except SystemExit as exit:
        code = exit.code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and said in errors[0], errors


def test_without_trl_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit):
        main(["dpo", "--help"])
    assert "needs TRL 1.16 or later" in capsys.readouterr().err


def test_a_run_file_holds_the_options_of_these_commands_too(place, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("losia_dist.recipe.trl.run.train_with_trl", lambda kind, options: seen.update(kind=kind, o=options))
    file = tmp_path / "dpo.yaml"
    values = {"model": str(place / "model"), "train_file": [str(place / "pairs.jsonl")], "beta": 0.2, "bf16": False}
    values |= {"losia_config": {"period": 3}, "output_dir": str(tmp_path / "out"), "gradient_checkpointing": False}
    file.write_text(yaml.safe_dump(values))
    assert main(["dpo", str(file), "--beta", "0.3"]) == 0
    options = SimpleNamespace(**vars(seen["o"]))
    assert (seen["kind"], options.beta, options.bf16, options.losia_config) == ("dpo", 0.3, False, '{"period": 3}')
