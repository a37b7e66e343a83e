"""What stands beside exported weights: all that the model needs to be used, nothing of the weights that were there before."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups, save_checkpoint
from losia_dist.errors import ConfigError
from losia_dist.export import beside
from losia_dist.export.model_directory import ModelDirectory
from losia_dist.export.weight_files import INDEX, WEIGHTS
from losia_dist.integrations.trainer.best_model import load_plain_weights
from losia_dist.ranks.agreement import Agreement
from tests.support.models import tiny_llama
from tests.support.trl_models import save_tiny_model

CODE = (
    "from transformers import LlamaForCausalLM\nfrom .inner.own_layers import NOTHING\nclass Own(LlamaForCausalLM):\n    pass\n"
)
TAKEN = [
    *("tokenizer.json", "tokenizer_config.json", "tekken.json", "spiece.model", "vocab.bpe", "bpe.codes", "own.tiktoken"),
    *("merges.txt", "special_tokens.yaml", "chat_template.jinja", "chat_template.json", "LICENSE"),
    *("additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "processor_config.json", "modeling_own.py", "inner/own_layers.py", "inner/__init__.py"),
    *("qformer_tokenizer/tokenizer_config.json", "qformer_tokenizer/vocab.txt"),
]
LEFT = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model-00001-of-00002.safetensors", "consolidated.safetensors"),
    *("tf_model.h5", "flax_model.msgpack", "model.gguf", "onnx/model.onnx", "onnx/tokenizer_config.json"),
    *("original/params.json", "original/consolidated.00.pth", "adapter_config.json", "adapter_model.safetensors"),
    *("hf_quant_config.json", "trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "zero_to_fp32.py"),
    *("checkpoint-3/config.json", "checkpoint-3/tokenizer_config.json", "_losia_state/base/manifest.json", ".git/config"),
    *(".gitattributes", "README.md", "train.jsonl", "picture.png", "runs/events.out.tfevents.1", "another/config.json"),
    *("another/tokenizer_config.json", "__pycache__/modeling_own.py", "notes/todo.txt"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model directory with everything that people have in one."""
    directory = tmp_path_factory.mktemp("base")
    save_tiny_model(directory)
    for name in [*TAKEN, *LEFT]:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("{}" if path.suffix == ".json" else f"of {name}")
    (directory / "modeling_own.py").write_text(CODE)
    return directory


def conductor(model=None) -> LoSiA:
    config = LoSiAConfig(rank_factor=0.25, period=2)
    converted = get_losia_model(tiny_llama() if model is None else model, config)
    losia = LoSiA(converted, LoSiAAdamW(losia_parameter_groups(converted, lr=1e-3)), config)
    with torch.no_grad():
        losia.sites[0].subnet.add_(1.0)
    return losia


def found_in(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["live", "checkpoint"])
def test_everything_of_the_base_but_weights_and_training_state_is_taken(base, tmp_path, source):
    losia = conductor()
    if source == "checkpoint":
        save_checkpoint(tmp_path / "run", model=losia.model, optimizer=losia.state.optimizer, losia=losia)
    export_model(losia if source == "live" else tmp_path / "run", tmp_path / "model", base_model=base)
    assert found_in(tmp_path / "model") == {*TAKEN, "config.json", "generation_config.json", "README.md", WEIGHTS}
    assert (tmp_path / "model" / "README.md").read_text() != (base / "README.md").read_text()  # a card of its own
    assert (tmp_path / "model" / "modeling_own.py").read_text() == CODE
    assert not torch.equal(
        load_file(tmp_path / "model" / WEIGHTS)[f"{losia.sites[0].name}.weight"],
        load_file(base / WEIGHTS)[f"{losia.sites[0].name}.weight"],
    )


def test_what_is_larger_than_any_vocabulary_is_left_out_and_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "LARGEST", 100)
    (base / "merges.txt").write_text("a b\n" * 100)
    with pytest.warns(UserWarning, match=r"merges\.txt \(400 bytes\) was not copied"):
        export_model(conductor(), tmp_path / "model", base_model=base)
    assert not (tmp_path / "model" / "merges.txt").exists() and (tmp_path / "model" / "tekken.json").exists()


def tokenizer_with(directory, template):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(directory))
    tokenizer.chat_template = template
    return tokenizer


NAMED = {"default": "{% for m in messages %}{{ m.content }} <eos> {% endfor %}", "tool_use": "T{{ messages }}"}


def test_named_templates_and_a_tokenizer_that_is_passed_survive_and_old_ones_do_not(tmp_path):
    losia = conductor()
    named, plain = tokenizer_with(tmp_path / "one", NAMED), tokenizer_with(tmp_path / "two", "P{{ messages }}")
    named.save_pretrained(tmp_path / "one")
    for target, settings, wanted in (
        ("copied", {"base_model": tmp_path / "one"}, NAMED),
        ("passed", {"tokenizer": named}, NAMED),
        ("passed", {"tokenizer": plain}, plain.chat_template),  # over what was there
        ("copied", {"tokenizer": plain, "base_model": tmp_path / "one"}, plain.chat_template),
    ):
        export_model(losia, tmp_path / target, **settings)
        assert AutoTokenizer.from_pretrained(tmp_path / target).chat_template == wanted


def test_a_processors_template_stays_beside_a_tokenizer_that_has_none(tmp_path):
    base, tokenizer = tmp_path / "base", tokenizer_with(tmp_path / "base", None)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    (base / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    export_model(conductor(), tmp_path / "model", base_model=base, tokenizer=tokenizer)
    assert (tmp_path / "model" / "chat_template.json").read_text() == (base / "chat_template.json").read_text()


def test_over_an_older_model_its_weights_go_and_nobody_elses(tmp_path):
    older = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX, "pytorch_model.bin"]
    for name in [*older, "model_ema.safetensors", "model_best.safetensors", "pytorch_model_ema.bin", "mine.txt"]:
        (tmp_path / name).write_text("older")
    export_model(conductor(), tmp_path)
    there = {"model_ema.safetensors", "model_best.safetensors", "pytorch_model_ema.bin", "mine.txt"}
    assert found_in(tmp_path) == {*there, "config.json", "generation_config.json", "README.md", WEIGHTS}


def said_of(action) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return "\n".join(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))


def test_what_inference_lacks_is_named(tmp_path):
    losia = conductor()
    losia.model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "hub/repo--modeling_far.Far"}
    said = said_of(lambda: export_model(losia, tmp_path / "model"))
    assert "lacks a tokenizer (pass tokenizer=" in said and "modeling_own.py" in said and "modeling_far" not in said
    save_tiny_model(tmp_path / "base")
    (tmp_path / "base" / "modeling_own.py").write_text("")
    assert "lacks" not in said_of(lambda: export_model(losia, tmp_path / "model", base_model=tmp_path / "base"))


@pytest.mark.parametrize("way", ["passed", "of the base", "from a checkpoint"])
@pytest.mark.parametrize("before, after", [(2, [2, 4, 1]), ([7, 1], [7, 1, 4]), (None, [4, 1]), ([1, 4], [1, 4])])
def test_tokens_that_end_an_answer_end_generation(tmp_path, before, after, way):
    """eos is <eos> (1) here, and the chat template ends a turn with "assistant" (4), a special token of this tokenizer."""
    tokenizer = tokenizer_with(tmp_path / "base", "{% for m in messages %}{{ m.content }} assistant\n{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["assistant"]})
    tokenizer.save_pretrained(tmp_path / "base")
    losia = conductor()
    losia.model.generation_config.eos_token_id = before
    settings = {"tokenizer": tokenizer} if way == "passed" else {"base_model": tmp_path / "base"}
    source = losia
    if way == "from a checkpoint":
        source = tmp_path / "run"
        save_checkpoint(source, model=losia.model, optimizer=losia.state.optimizer, losia=losia)
    said = said_of(lambda: export_model(source, tmp_path / "model", **settings))
    stops = json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(stops) == sorted(after)
    assert ("added in the written model" in said) == (before != [1, 4])
    assert losia.model.generation_config.eos_token_id == before  # the live model's own is as it was


@pytest.mark.parametrize("left_over", ["index", "nothing"])
def test_an_index_beside_a_whole_file_is_not_read(tmp_path, left_over):
    """As Transformers reads the directory: the single file first."""
    losia = conductor()
    export_model(losia, tmp_path / "best")
    wanted = load_file(tmp_path / "best" / WEIGHTS)
    if left_over == "index":
        stale = "model-00001-of-00001.safetensors"
        save_file({name: torch.zeros_like(tensor) for name, tensor in wanted.items()}, tmp_path / "best" / stale)
        (tmp_path / "best" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(wanted, stale)}))
    stored = ModelDirectory(tmp_path / "best")
    with torch.no_grad():
        losia.sites[0].subnet.mul_(3.0)
    load_plain_weights(losia, tmp_path / "best", torch.device("cpu"), Agreement(None))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best").state_dict()
    losia.consolidate()
    for name, tensor in wanted.items():
        assert torch.equal(stored.tensor(name), tensor) and torch.equal(loaded[name], tensor), name
        assert torch.equal(losia.model.get_parameter(name), tensor), name
    shutil.rmtree(tmp_path / "best")


@pytest.mark.parametrize("name", ["adapter_config.json", "a tokenizer's name"])
def test_what_would_be_loaded_on_top_or_is_no_tokenizer_is_refused_and_nothing_changes(tmp_path, name):
    losia, target = conductor(), tmp_path / "exported"
    target.mkdir()
    (target / "adapter_config.json").write_text("{}") if name.endswith("json") else (target / "notes.txt").write_text("mine")
    before = sorted(path.name for path in target.iterdir())
    said = "holds a PEFT adapter" if name.endswith("json") else "tokenizer='some/model' is a name: pass the tokenizer itself"
    with pytest.raises(ConfigError, match=said):
        export_model(losia, target, tokenizer=None if name.endswith("json") else "some/model")
    assert sorted(path.name for path in target.iterdir()) == before
