"""Which layers get a subnet, which parameters train, and what a wrong name is answered with."""

import pytest
import torch
from torch import nn

from losia_dist import LoSiAConfig, get_losia_model, losia_parameter_groups, print_trainable_parameters
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites
from tests.support.models import tiny_llama


def converted(config: LoSiAConfig, **overrides) -> nn.Module:
    return get_losia_model(tiny_llama(**overrides), config)


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_sites(model)]


def test_all_linear_takes_every_linear_layer_but_the_output_layer():
    chosen = names(converted(LoSiAConfig()))
    assert len(chosen) == 3 * 7
    assert "lm_head" not in chosen


@pytest.mark.parametrize(
    "targets, per_layer", [(["q_proj"], 1), (["mlp.down_proj", "v_proj"], 2), (r"model\.layers\.\d+\.self_attn\..*", 4)]
)
def test_targets_are_chosen_by_ending_or_by_expression(targets, per_layer):
    assert len(names(converted(LoSiAConfig(target_modules=targets)))) == 3 * per_layer


def test_only_subnets_train_by_default_and_the_checkpoint_names_stay():
    before = set(tiny_llama().state_dict())
    model = converted(LoSiAConfig())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(name.endswith(".subnet") for name in trainable)
    assert before <= set(model.state_dict())
    added = set(model.state_dict()) - before
    assert added and all(key.rsplit(".", 1)[1] in ("subnet", "row_index", "col_index") for key in added)


def test_the_subnet_starts_with_the_weights_own_values():
    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    get_losia_model(model, LoSiAConfig())
    layer = model.model.layers[1].mlp.up_proj
    assert layer.subnet.shape == (weight.shape[0] // 8, weight.shape[1] // 8)
    assert torch.equal(layer.subnet.data, weight[layer.row_index][:, layer.col_index])
    for index in (layer.row_index, layer.col_index):
        assert torch.equal(index, index.unique())  # sorted and without repeats


def test_first_subnets_depend_on_seed_and_name_alone():
    whole, part = converted(LoSiAConfig(seed=5)), converted(LoSiAConfig(seed=5, target_modules=["down_proj"]))
    other = converted(LoSiAConfig(seed=6))
    pick = [m.model.layers[2].mlp.down_proj.row_index for m in (whole, part, other)]
    assert torch.equal(pick[0], pick[1])
    assert not torch.equal(pick[0], pick[2])


def test_groups_are_one_per_decoder_layer_then_the_output_layer_then_the_rest():
    model = converted(LoSiAConfig(output_rank_factor=0.25, train_norms=True))
    groups = losia_parameter_groups(model, lr=1e-3)
    assert [g["losia_group"] for g in groups] == [f"model.layers.{i}" for i in range(3)] + ["lm_head", None]
    assert len(groups[-1]["params"]) == 2 * 3 + 1  # two norms a layer and the last one
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_output_layer_keeps_all_columns_and_its_own_share_of_rows():
    model = converted(LoSiAConfig(output_rank_factor=0.25))
    rows, columns = model.lm_head.weight.shape
    assert model.lm_head.subnet.shape == (rows // 4, columns)


def test_modules_to_save_and_embeddings_train_in_full():
    model = converted(LoSiAConfig(modules_to_save=["model.norm"], train_embeddings=True))
    assert model.model.norm.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert not model.model.layers[0].input_layernorm.weight.requires_grad


def test_what_trains_is_counted_of_the_plain_models_parameters(capsys):
    model = tiny_llama()
    every = sum(p.numel() for p in model.parameters())
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, train_norms=True))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print_trainable_parameters(model)
    share = 100 * trainable / every
    assert capsys.readouterr().out == f"trainable params: {trainable:,} || all params: {every:,} || trainable%: {share:.4f}\n"


def test_biases_are_kept_and_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 16)
    expected = model(x)
    get_losia_model(model, LoSiAConfig(rank_factor=0.25))
    assert torch.allclose(model(x), expected)
    assert not model[0].bias.requires_grad


@pytest.mark.parametrize(
    "config, message",
    [
        ({"target_modules": ["q_prj"]}, r"no module is named 'q_prj'. Nearest: .*q_proj"),
        ({"target_modules": ["q_proj", "gate"]}, r"no module is named 'gate'. Nearest: .*gate_proj"),
        ({"target_modules": r"layers\.9\..*"}, r"no full name of a linear layer or of experts matches"),
        ({"target_modules": r"layers\.(9"}, r"not a valid regular expression"),
        ({"target_modules": ["lm_head"]}, r"set output_rank_factor instead"),
        ({"modules_to_save": ["nrm"]}, r"modules_to_save: no module is named 'nrm'. Nearest: .*norm"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, r"already trains by a subnet"),
        ({"rank_factor": 0.001}, r"rank_factor=0.001 leaves layer '.*' \(\d+ x \d+\) no row: at least 1/\d+ is needed"),
        ({"rank_factor": (0.5, 0.001)}, r"no column: at least"),
        ({"output_rank_factor": 0.001}, r"output_rank_factor=0.001 leaves layer 'lm_head'"),
    ],
)
def test_names_and_sizes_that_do_not_fit_the_model_are_refused_with_the_fix(config, message):
    with pytest.raises(ConfigError, match=message):
        converted(LoSiAConfig(**config))


def test_a_refused_model_is_left_untouched():
    model = tiny_llama()
    with pytest.raises(ConfigError):
        get_losia_model(model, LoSiAConfig(rank_factor=0.001))
    assert not find_sites(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match="has no linear layer"):
        get_losia_model(nn.Sequential(nn.Embedding(4, 4), nn.ReLU()), LoSiAConfig())


def test_converting_twice_is_refused():
    with pytest.raises(ConfigError, match="already has subnets"):
        get_losia_model(converted(LoSiAConfig()), LoSiAConfig())


def test_projections_that_nn_multiheadattention_reads_past_are_left_out():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 16)})
    assert names(get_losia_model(model, LoSiAConfig())) == ["fc"]
