"""Models out of checkpoints: the live model's weights and logits, tied ones too, and deltas that rebuild them bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, export_model, get_losia_model, losia_parameter_groups, save_checkpoint
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.errors import CheckpointError, ConfigError
from losia_dist.export import model_directory
from losia_dist.export.delta import apply_delta, save_delta
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.models import tiny_llama

# Subnets move at every step, so that the same layers are in the journal more than once, in overlapping places.
RUN = replace(runs.RUN, steps=9, config={**runs.RUN.config, "period": 1})
TIED = replace(RUN, model={"tie_word_embeddings": True})
SEVERAL = {"fp32": RUN, "bf16": replace(RUN, dtype="bf16"), "tied": TIED}


def train_and_export(engine, run, directory, plain=None):
    """Save at steps 1, 5 and 9, export live at 9; logits of the live model then."""
    losia, stepper, close = runs.start(engine, run)
    saved = runs.parts(losia)
    runs.train_on(losia, stepper, run, run.steps, lambda done: done % 4 == 1 and save_checkpoint(directory, **saved))
    export_model(losia, directory / "live")
    losia.consolidate()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = unwrap(losia.model).eval()(input_ids=tokens, use_cache=False).logits if engine == "one" else None
    close()
    return logits


def files_of(directory):
    return load_file(directory / "model.safetensors")


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("case", SEVERAL)
def test_an_export_from_a_checkpoint_is_the_live_model(tmp_path, case):
    logits = train_and_export("one", SEVERAL[case], tmp_path / "run")
    written = export_model(tmp_path / "run", tmp_path / "model")
    assert written == tmp_path / "model"
    assert_same_weights(files_of(tmp_path / "model"), files_of(tmp_path / "run" / "live"))
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((d / name).read_text()) for d in (tmp_path / "model", tmp_path / "run" / "live"))
        assert ours == theirs
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.tie_word_embeddings == (case == "tied")
    with torch.no_grad():
        again = loaded(input_ids=torch.arange(24).reshape(2, 12), use_cache=False).logits
    if case != "bf16":  # the live model's rotary frequencies were cast with its weights; the loaded one computes them in fp32
        assert torch.equal(again, logits)


@pytest.mark.parametrize("engine", ["ddp", slow("zero3"), "fsdp2"])
def test_sharded_runs_export_the_same(ranks, tmp_path, engine):
    ranks(2, train_and_export, engine, RUN, tmp_path / "run")
    export_model(str(tmp_path / "run" / "step-00000009"), tmp_path / "model")
    assert_same_weights(files_of(tmp_path / "model"), files_of(tmp_path / "run" / "live"))


@pytest.mark.parametrize("case", SEVERAL)
def test_base_and_delta_are_the_export_bit_for_bit(tmp_path, case):
    run, base = SEVERAL[case], tmp_path / "base"
    tiny_llama(**run.model).to(torch.bfloat16 if run.dtype == "bf16" else torch.float32).save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    train_and_export("one", run, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "model", base_model=base)
    delta = save_delta(tmp_path / "run", tmp_path / "run.delta", base)
    apply_delta(delta, base, tmp_path / "rebuilt")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "rebuilt" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()

    other = load_file(base / "model.safetensors")
    other["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(other, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not the model that .*run\.delta was made from.*layers\.1\.mlp\.up_proj"):
        apply_delta(delta, base, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".*incomplete"))


def test_a_delta_is_compact_and_from_another_precision_exact(tmp_path):
    wide = {"hidden_size": 144, "intermediate_size": 256, "num_key_value_heads": 3}
    run = replace(RUN, dtype="bf16", model=wide, config={"rank_factor": 0.125, "period": 4})
    tiny_llama(**wide).save_pretrained(tmp_path / "base")  # fp32; the run is in bf16
    train_and_export("one", run, tmp_path / "run")
    delta = save_delta(tmp_path / "run", tmp_path / "run.delta", tmp_path / "base")
    export_model(tmp_path / "run", tmp_path / "model")
    apply_delta(delta, tmp_path / "base", tmp_path / "rebuilt")
    assert_same_weights(files_of(tmp_path / "rebuilt"), files_of(tmp_path / "model"))
    # Three layers of subnets of 1/64, one of them moved on once or twice, and the header.
    assert delta.stat().st_size < 0.15 * (tmp_path / "model" / "model.safetensors").stat().st_size


def test_weights_are_cut_into_files_as_asked(tmp_path, monkeypatch):
    train_and_export("one", RUN, tmp_path / "run")
    monkeypatch.setitem(model_directory.write_model_directory.__kwdefaults__, "shard_bytes", 30_000)
    export_model(tmp_path / "run", tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_weights(dict(loaded.state_dict()), files_of(tmp_path / "run" / "live"))


def test_a_damaged_checkpoint_and_what_is_neither_are_refused(tmp_path):
    train_and_export("one", RUN, tmp_path / "run")
    damaged = sorted((tmp_path / "run").glob("journal/*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or overwritten"):
        export_model(tmp_path / "run", tmp_path / "model")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export_model(tmp_path / "nowhere", tmp_path / "model")
    with pytest.raises(ConfigError, match="given a LlamaForCausalLM"):
        export_model(tiny_llama(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


class Plain(torch.nn.Module):
    """No Transformers model: a buffer, and two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
        self.again = self.second
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.second(self.first(x)) * self.scale


def test_a_plain_module_gets_a_state_dict_that_it_loads(tmp_path):
    torch.manual_seed(0)
    config = LoSiAConfig(rank_factor=0.5, period=2, target_modules=["first"])
    model = get_losia_model(Plain(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=0.1), lr=0.1)
    losia = LoSiA(model, optimizer, config)
    for _ in range(3):
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
    save_checkpoint(tmp_path / "run", model=model, optimizer=optimizer, losia=losia)
    export_model(tmp_path / "run", tmp_path / "model")
    plain = Plain()
    plain.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    x = torch.randn(3, 12)
    assert torch.equal(plain(x), model(x))
