"""The model card of an export, and the way to the hub."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups
from losia_dist.cli.main import main, train_main
from losia_dist.export.model_card import card_text
from tests.support.launching import arguments, make_material
from tests.support.models import tiny_llama


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the script with a checkpoint and an exported model; and its material."""
    material = make_material(tmp_path_factory.mktemp("material"))
    directory = tmp_path_factory.mktemp("run") / "first"
    words = arguments(material, directory, max_steps=2, save_steps=2)
    assert train_main([*words, "--train_file", f"{material['instruction']}:2", f"{material['instruction_heldout']}:1"]) == 0
    return directory, material


def card_of(directory):
    return ModelCard.load(directory / "README.md")


def test_the_card_says_what_was_trained_how_and_with_what_loss(run):
    directory, material = run
    card = card_of(directory / "model")
    assert card.data.library_name == "transformers" and "losia" in card.data.tags
    assert card.data.base_model is None  # a directory is nobody else's business
    assert "fine-tune of `model` by [LoSiA]" in card.text and "2507.04487" in card.text and "@article" in card.text
    assert str(material["model"].parent) not in card.content
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card.text, re.MULTILINE))
    summary = json.loads((directory / "summary.json").read_text())
    assert rows["held-out loss after training"] == f"{summary['held_out_loss_after']:.4f}"
    assert rows["training loss at the end"] == f"{summary['train_loss']:.4f}"
    assert rows["data"] == "`instruction.jsonl:2`, `instruction_heldout.jsonl:1`"
    assert (rows["optimizer steps"], rows["engine"], rows["learning_rate"]) == ("2", "one process", "0.003")
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL).group(1))
    assert LoSiAConfig.from_dict(settings) == LoSiAConfig.from_file(material["losia"])
    loading = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    loading = loading.replace('"model"', repr(str(directory / "model")))
    exec(compile(loading, "README.md", "exec"), names := {})
    assert names["model"].config.model_type == "llama"


def test_an_export_of_a_checkpoint_says_the_same_and_leaves_another_card_alone(run, tmp_path):
    directory, material = run
    assert main(["export", str(directory), str(tmp_path / "exported"), "--base_model", str(material["model"])]) == 0
    exported, written = card_of(tmp_path / "exported").text, card_of(directory / "model").text
    assert exported.replace("exported", "model") == written
    (tmp_path / "exported" / "README.md").write_text("mine")
    assert main(["export", str(directory), str(tmp_path / "exported"), "--base_model", str(material["model"])]) == 0
    assert (tmp_path / "exported" / "README.md").read_text() == "mine"


def test_a_live_export_has_a_card_too(tmp_path):
    config = LoSiAConfig(rank_factor=0.25, period=7)
    model = get_losia_model(tiny_llama(), config)
    model.config._name_or_path = "owner/base"
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    export_model(losia, tmp_path / "model")
    card = card_of(tmp_path / "model")
    assert card.data.base_model == "owner/base" and "fine-tune of `owner/base` by" in card.text and "period: 7" in card.text


def test_text_of_a_run_breaks_no_table_and_a_full_run_speaks_of_no_subnets():
    text = card_text("m", {"method": "full", "data": "a | b\n## c", "options": {"model": "x", "train_file": ["t`.jsonl"]}})
    assert "| examples | a \\| b ## c |" in text and "`t.jsonl`" in text
    assert "of all weights" in text and "LoSiA's settings" not in text


class Hub:
    """Stands in for the hub: what it was sent."""

    def __init__(self, monkeypatch):
        self.made, self.sent = [], {}
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **settings: self.create(name, settings))
        monkeypatch.setattr(HfApi, "upload_folder", lambda api, **given: self.upload(**given))

    def create(self, name, settings):
        self.made.append((name, settings))
        return f"https://hub/{name}"

    def upload(self, repo_id, folder_path, **_):
        self.sent[repo_id] = {path.name for path in Path(folder_path).iterdir()}


def test_a_model_goes_to_the_hub_with_its_card(run, tmp_path, monkeypatch, capsys):
    directory, material = run
    hub = Hub(monkeypatch)
    words = ["export", str(directory), str(tmp_path / "model"), "--base_model", str(material["model"])]
    assert main([*words, "--push_to_hub", "owner/name"]) == 0
    assert "pushed: https://hub/owner/name" in capsys.readouterr().out
    assert hub.made == [("owner/name", {"private": True, "exist_ok": True})]
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= hub.sent["owner/name"]
    words = arguments(material, tmp_path / "run", max_steps=1, eval_file=None, push_to_hub="owner/trained")
    assert train_main(words) == 0
    assert "pushed: https://hub/owner/trained" in capsys.readouterr().out and "README.md" in hub.sent["owner/trained"]


def test_what_cannot_be_pushed_is_refused_before_training(run, tmp_path, monkeypatch, capsys):
    directory, material = run
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name, words in (("owner/name", "there is no token"), ("a/b/c", "give OWNER/NAME")):
        capsys.readouterr()
        assert train_main(arguments(material, tmp_path / "run", push_to_hub=name)) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train_main(arguments(material, tmp_path / "run", push_to_hub="owner/name", no_save=True)) == 2
    assert "--no_save leaves out" in capsys.readouterr().err
    Hub(monkeypatch)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_of_a_test")
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **given: (_ for _ in ()).throw(OSError("no route")))
    assert main(["export", str(directory), str(tmp_path / "model"), "--push_to_hub", "owner/name"]) == 2
    assert "no route. The model is in" in capsys.readouterr().err and (tmp_path / "model" / "model.safetensors").is_file()
