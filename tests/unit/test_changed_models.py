"""A converted model that something else has changed: refused with the layers' names, or it trains as it should."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.subnet.convert import find_sites
from tests.support.models import tiny_llama

CONFIG = LoSiAConfig(rank_factor=0.25, output_rank_factor=0.25, period=2)


def converted(**model):
    return get_losia_model(tiny_llama(**model), CONFIG)


def conductor(model):
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    return LoSiA(model, optimizer, CONFIG)


def step(losia, seed=0):
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(seed))
    losia.model(input_ids=tokens, labels=tokens).loss.backward()
    losia.state.optimizer.step()
    losia.step()
    losia.state.optimizer.zero_grad()


def new_vocabulary(model):
    model.resize_token_embeddings(104)


def new_output(model):
    model.set_output_embeddings(nn.Linear(36, 97, bias=False))


def new_input(model):
    model.set_input_embeddings(nn.Embedding(97, 36))


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def swap(model):
    model.model.layers[1].mlp.up_proj = nn.Linear(36, 77, bias=False)


def adapter(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def adapter_elsewhere(model):
    """The model's own layers stay what they are, and are frozen."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    return get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))


def unfreeze(model):
    model.requires_grad_(True)


@pytest.mark.parametrize(
    "change, tied, words",
    [
        (new_vocabulary, False, "lm_head: made to train by a subnet .*resize_token_embeddings"),
        (new_vocabulary, True, r"lm_head is \[104, 36\] now, and was \[97, 36\]"),
        (new_output, False, "lm_head: made to train by a subnet"),
        (new_input, True, "lm_head and the input embedding share a weight now .*set_input_embeddings"),
        (tie, False, "lm_head and the input embedding share a weight now"),
        (swap, False, r"model\.layers\.1\.mlp\.up_proj: made to train"),
        (adapter, False, r"model\.layers\.0\.self_attn\.\w+: its subnet was frozen since get_losia_model"),
        (adapter_elsewhere, False, "its subnet was frozen since get_losia_model"),
        (unfreeze, False, "its whole weight was made to train"),
    ],
)
def test_before_the_conductor_is_made(change, tied, words):
    model = converted(tie_word_embeddings=tied)
    model = change(model) or model
    with pytest.raises(ConfigError, match=words + ".*before get_losia_model"):
        LoSiA(model, LoSiAAdamW([p for p in model.parameters() if p.requires_grad]), CONFIG)


def test_what_changes_nothing_of_the_subnets_goes_on():
    """An embedding that does not train may be resized before anything is made; a model may be cast and copied."""
    config = LoSiAConfig(rank_factor=0.25, period=2)
    model = get_losia_model(tiny_llama(), config)
    model.resize_token_embeddings(104)
    model = copy.deepcopy(model.to(torch.bfloat16))
    step(LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2), config))


@pytest.mark.parametrize("change", [new_vocabulary, swap])
def test_while_it_trains_it_is_seen_before_anything_is_saved(tmp_path, change):
    losia = conductor(converted())
    step(losia)
    change(losia.model)
    with pytest.raises(ConfigError, match="made to train by a subnet"):
        losia.consolidate()


def test_a_frozen_model_can_still_be_saved():
    losia = conductor(converted())
    losia.model.requires_grad_(False)
    losia.consolidate()


def test_a_copy_computes_what_the_model_did_then_and_takes_nothing_from_the_run():
    losia = conductor(converted())
    step(losia)
    tokens = torch.arange(24).view(2, 12)
    then = losia.model(input_ids=tokens).logits
    snapshot = copy.deepcopy(losia.model)
    assert all(layer.gradient_sink is None for layer in find_sites(snapshot))
    for seed in range(4):
        step(losia, seed)
    assert torch.equal(snapshot(input_ids=tokens).logits, then)
    now = losia.model(input_ids=tokens).logits
    snapshot.load_state_dict(losia.model.state_dict())
    assert torch.equal(snapshot(input_ids=tokens).logits, now)
    step(losia)


def test_a_copy_may_be_cast_and_moved():
    losia = conductor(converted())
    snapshots = [copy.deepcopy(losia.model).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    for seed in range(3):
        step(losia, seed)
    for snapshot in snapshots:
        assert snapshot(input_ids=torch.arange(12).view(1, 12)).logits.dtype == next(snapshot.parameters()).dtype


def average_on_the_first_rank():
    model = DistributedDataParallel(converted())
    losia = conductor(model)
    average = AveragedModel(model.module) if dist.get_rank() == 0 else None
    for seed in range(3):
        step(losia, seed)
        if average is not None:
            average.update_parameters(model.module)


def test_a_running_mean_on_the_first_rank_alone_stops_all(ranks):
    errors = ranks.errors(2, average_on_the_first_rank)
    assert all(kind == "UnsupportedError" and "deep copy" in message for kind, message in errors)


def test_a_copy_that_is_driven_by_itself_trains():
    losia = conductor(converted())
    other = conductor(copy.deepcopy(losia.model))
    for seed in range(5):
        step(losia, seed)
        step(other, seed)
    for ours, theirs in zip(losia.sites, other.sites, strict=True):
        assert torch.equal(ours.subnet, theirs.subnet) and torch.equal(ours.row_index, theirs.row_index)


def by_torch(average, model):
    average.update_parameters(model)


def by_data(average, model):
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.data.lerp_(value.data, 0.5)


@pytest.mark.parametrize("way", [by_torch, by_data])
def test_a_running_mean_of_parameters_is_refused_before_it_is_wrong(way):
    losia = conductor(converted())
    average = AveragedModel(losia.model) if way is by_torch else copy.deepcopy(losia.model)
    with pytest.raises(UnsupportedError, match=r"deep copy .* was changed .*docs/averaging\.md"):
        for seed in range(2):  # one slot
            step(losia, seed)
            way(average, losia.model)
        step(losia)
        step(losia)
    with pytest.raises(UnsupportedError, match="was changed"):
        average(input_ids=torch.arange(12).view(1, 12))


def test_a_mean_of_state_dicts_is_refused():
    one, two = conductor(converted()), conductor(converted())
    for seed in range(4):
        step(two, seed)
    others = two.model.state_dict()
    mean = {name: (tensor + others[name]) / 2 for name, tensor in one.model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"index of .* in this state dict is no place.*docs/averaging\.md"):
        converted().load_state_dict(mean)
    converted().load_state_dict(others)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_weights_can_be_averaged_as_the_docs_show(tmp_path, monkeypatch, tied):
    """The block of docs/averaging.md with settings of a small run, against means of the whole weights, over several moves."""
    text = (Path(__file__).parents[2] / "docs" / "averaging.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    output = "" if tied else ", output_rank_factor=0.25"
    for before, after in (("0.999", "0.8"), ("5e-5", "1e-2"), ("0.125, period=100", f"0.25, period=2{output}")):
        assert before in block
        block = block.replace(before, after)
    names: dict = {"model": tiny_llama(tie_word_embeddings=tied)}
    weights = [name for name, _ in names["model"].named_parameters()]
    seen = []

    def loader():
        for seed in range(9):
            tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(seed))
            yield {"input_ids": tokens, "labels": tokens}
            seen.append({name: names["model"].get_parameter(name).detach().clone() for name in weights})

    monkeypatch.chdir(tmp_path)
    names["loader"] = loader()
    exec(compile(block, "docs/averaging.md", "exec"), names)
    expected = seen[0]
    for now in seen[1:]:
        expected = {name: 0.8 * expected[name] + 0.2 * now[name] for name in weights}
    averaged = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged")
    for name in weights:
        assert torch.allclose(averaged.get_parameter(name), expected[name], atol=1e-6), name
    assert (expected["model.layers.0.mlp.up_proj.weight"] - seen[-1]["model.layers.0.mlp.up_proj.weight"]).abs().max() > 1e-3
