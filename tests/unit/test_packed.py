"""Quantized weights: what their codes stand for, what subnets leave beside them, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.access import read_subnet, write_back
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.overlay import Overlay
from losia_dist.subnet.packed import packed_weights
from tests.support.families import tiny_model
from tests.support.models import tiny_llama
from tests.support.quantized import dequantized, quantize

FORMS = ["nf4", "nf4:double", "nf4:bfloat16", "fp4:float32:double", "int8", "fp8"]
SIZES = {"hidden_size": 48, "intermediate_size": 80}
TOKENS = torch.arange(3, 35).reshape(2, 16)


def converted(form: str, **config):
    model = quantize(tiny_llama(**SIZES), form)
    return get_losia_model(model, LoSiAConfig(**{"rank_factor": 0.25, **config}))


@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_a_weight_and_the_whole_weight_are_the_values_of_its_codes(form):
    model = converted(form)
    plain = dequantized(quantize(tiny_llama(**SIZES), form))
    access = resolve_parameters(model)
    for site in find_sites(model):
        expected = plain.get_submodule(site.name).weight.data
        rows, columns = torch.tensor([0, 3, 7, 15]), torch.tensor([1, 2, 30])
        torch.testing.assert_close(read_subnet(access, site, rows, columns), expected[rows][:, columns], rtol=0, atol=1e-7)
        torch.testing.assert_close(access.read_whole(site.weight), expected, rtol=0, atol=1e-7)
        assert access.shape(site.weight) == tuple(expected.shape) and site.subnet.dtype == torch.float32


@pytest.mark.parametrize("form", ["nf4:double", "int8", "fp8"])
def test_a_base_in_bf16_has_subnets_in_bf16_and_reads_the_same_everywhere(form):
    model = quantize(tiny_llama(**SIZES), form)
    for module in model.modules():
        if hasattr(module, "quant_state") or hasattr(module.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
            module.weight.quant_state.dtype = torch.bfloat16
    model.lm_head.to(torch.bfloat16), model.model.embed_tokens.to(torch.bfloat16), model.model.norm.to(torch.bfloat16)
    for layer in model.model.layers:
        layer.input_layernorm.to(torch.bfloat16), layer.post_attention_layernorm.to(torch.bfloat16)
    get_losia_model(model, LoSiAConfig(rank_factor=0.25))
    access = resolve_parameters(model)
    for site in find_sites(model):
        assert site.subnet.dtype == torch.bfloat16
        left = torch.randn(site.subnet.shape).mul_(0.01).bfloat16() + site.subnet.data
        write_back(access, site, site.row_index, site.col_index, left)
        dense = site.packed.dense(site.weight, torch.bfloat16)
        block = read_subnet(access, site, site.row_index, site.col_index)
        assert torch.equal(dense[site.row_index][:, site.col_index], block)
        assert not torch.equal(block, site.subnet)


def nearest_nf4(values: torch.Tensor) -> torch.Tensor:
    """Each value's nearest level in blocks of 64, by hand; scales kept in bf16."""
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu")
    flat = values.reshape(-1)
    found = []
    for start in range(0, flat.numel(), 64):
        block = flat[start : start + 64]
        scale = block.abs().max()
        code = (block[:, None] / scale - levels).abs().argmin(1)
        found.append(levels[code] * scale.bfloat16().float())
    return torch.cat(found).view(values.shape)


def by_rows_of_bytes(values: torch.Tensor) -> torch.Tensor:
    scale = values.abs().amax(1, keepdim=True) / 127
    return (values / scale).round() * scale


KEPT = {
    "nf4": nearest_nf4,
    "int8": by_rows_of_bytes,
    "bf16": lambda values: values.bfloat16().float(),
    "fp32": lambda values: values,
}


@pytest.mark.parametrize("form", KEPT)
def test_what_subnets_leave_adds_up_in_their_order(form):
    m, n = 20, 30
    overlay, matrix = Overlay((m, n), form), torch.randn(m, n)
    expected = matrix.clone()
    places = [(torch.arange(m), torch.tensor([2, 5])), (torch.tensor([1, 4, 9]), torch.arange(n))]
    places += [(torch.tensor([1, 4, 11]), torch.tensor([0, 5, 29]))]
    for rows, columns in places:
        difference = torch.randn(len(rows), len(columns))
        overlay.add(rows, columns, difference)
        expected[rows[:, None], columns] += KEPT[form](difference)
    found = overlay.add_to(matrix.clone())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    rows, columns = torch.tensor([0, 1, 4, 19]), torch.tensor([0, 2, 5, 6])
    block = overlay.add_to_block(matrix[rows][:, columns].clone(), rows, columns)
    assert torch.equal(block, found[rows][:, columns])


@pytest.mark.parametrize("form", KEPT)
def test_differences_of_more_than_the_whole_weight_become_one_of_the_whole(form):
    overlay, expected = Overlay((16, 64), form), torch.zeros(16, 64)
    for place in range(24):
        rows, columns = torch.arange(8), torch.arange(place % 3, 64, 3)
        difference = torch.randn(8, len(columns)) * 1e-3
        overlay.add(rows, columns, difference)
        expected[rows[:, None], columns] += difference
    whole = {"nf4": 0.53125, "int8": 1.0625, "bf16": 2, "fp32": 4}[form] * 16 * 64
    assert overlay.nbytes <= whole + 1 and len(overlay) < 24
    error = (overlay.add_to(torch.zeros(16, 64)) - expected).norm() / expected.norm()
    assert error < {"nf4": 0.35, "int8": 0.03, "bf16": 0.02, "fp32": 1e-6}[form]


def test_4_bits_with_quantized_scales_take_at_most_0_56_bytes_a_value_and_the_overlay_0_54():
    model = quantize(
        tiny_llama(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4), "nf4:double"
    )
    get_losia_model(model, LoSiAConfig(rank_factor=0.25))
    for layer in packed_weights(model).values():
        packed = layer.packed
        held = layer.weight.nbytes + sum(scale.nbytes for scale in packed.scales())
        assert held <= 0.56 * packed.shape[0] * packed.shape[1]
        packed.overlay.add(torch.arange(64), torch.arange(64), torch.randn(64, 64))
        assert packed.overlay.nbytes <= 0.54 * 64 * 64 + 8 * 128


@pytest.mark.parametrize("form", ["nf4:double", "nf4:bfloat16", "fp4", "int8", "fp8"])
def test_random_rounding_gives_a_neighbouring_code_and_the_value_in_the_mean(form):
    model = converted(form, retired="stochastic")
    access, site = resolve_parameters(model), find_sites(model)[0]
    rows, columns = site.row_index, site.col_index
    before = site.packed.dense(site.weight, torch.float32)
    values = (before[rows][:, columns] * 0.9).contiguous()
    codes, total = site.weight.data.clone(), torch.zeros_like(values)
    for _ in range(200):
        site.weight.data.copy_(codes)
        write_back(access, site, rows, columns, values)
        after = site.packed.dense(site.weight, torch.float32)
        total += after[rows][:, columns]
        after[rows[:, None], columns] = before[rows][:, columns]
        assert torch.equal(after, before)  # nothing else has changed
    step = (before.abs().max() / 4).item()
    assert (total / 200 - values).abs().max() < step
    assert (total / 200 - values).abs().mean() < 0.05 * (before[rows][:, columns] - values).abs().mean() + 0.02 * step


def test_random_rounding_is_the_same_each_time_and_another_in_each_layer_and_move():
    weights = []
    for _ in range(2):
        model = converted("nf4", retired="stochastic", seed=3)
        access = resolve_parameters(model)
        for site in find_sites(model)[:2]:
            for _ in range(2):
                write_back(access, site, site.row_index, site.col_index, site.subnet.data * 0.97)
        weights.append([site.weight.data.clone() for site in find_sites(model)[:2]])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_layers_without_a_subnet_compute_as_before_and_give_their_inputs_a_gradient():
    model = quantize(tiny_llama(**SIZES), "nf4:double")
    expected = dequantized(quantize(tiny_llama(**SIZES), "nf4:double"))
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, target_modules=["q_proj"]))
    torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=0, atol=1e-5)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for parameter in expected.parameters():
        parameter.requires_grad_(True)
    expected(input_ids=TOKENS, labels=TOKENS).loss.backward()
    site = find_sites(model)[0]
    full = expected.get_submodule(site.name).weight.grad
    torch.testing.assert_close(site.subnet.grad, full[site.row_index][:, site.col_index], rtol=0, atol=1e-6)


def test_a_copy_keeps_computing_what_the_model_did():
    model = converted("nf4:double")
    before = model(TOKENS).logits
    made = copy.deepcopy(model)
    for site in find_sites(model):
        write_back(resolve_parameters(model), site, site.row_index, site.col_index, site.subnet.data * 1.5)
        site.subnet.data.mul_(1.5)
    assert torch.equal(made(TOKENS).logits, before) and not torch.equal(model(TOKENS).logits, before)


def test_the_model_is_as_it_was_when_the_configuration_is_refused():
    model = quantize(tiny_llama(**SIZES), "nf4")
    before, kinds = model(TOKENS).logits, [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match="no module is named 'nothing'"):
        get_losia_model(model, LoSiAConfig(target_modules=["nothing"]))
    assert kinds == [type(module) for module in model.modules()]
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("form", ["nf4", "nf4:bfloat16"])
def test_a_quantized_layer_is_not_trained_in_full(form):
    model = quantize(tiny_llama(**SIZES), form)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match="'model.layers.0.mlp' .*'model.layers.0.mlp.gate_proj' is quantized.*skip_modules"):
        get_losia_model(model, LoSiAConfig(rank_factor=0.25, target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert kinds == [type(module) for module in model.modules()]


def test_a_state_dict_which_lacks_what_subnets_left_is_refused():
    model, moved = converted("nf4:double"), converted("nf4:double")
    logits = model(TOKENS).logits
    model.load_state_dict(moved.state_dict())  # nothing has moved in either
    assert torch.equal(model(TOKENS).logits, logits)
    access, site = resolve_parameters(moved), find_sites(moved)[0]
    write_back(access, site, site.row_index, site.col_index, site.subnet.data * 1.5)
    with pytest.raises(UnsupportedError, match="q_proj is quantized, and what subnets left.*goes on by load_checkpoint"):
        moved.load_state_dict(moved.state_dict())  # into a model that has moved on
    site.row_index.copy_(torch.arange(site.row_index.numel()))
    with pytest.raises(UnsupportedError, match="q_proj is quantized, and what subnets left.*goes on by load_checkpoint"):
        model.load_state_dict(moved.state_dict())  # from one
    stochastic = converted("nf4:double", retired="stochastic", seed=1)
    stochastic.load_state_dict(converted("nf4:double", retired="stochastic", seed=2).state_dict())  # codes hold all


def cast(model):
    model.model.layers[0].self_attn.q_proj.weight.data = model.model.layers[0].self_attn.q_proj.weight.data.half()
    return model(TOKENS)


def test_codes_that_something_has_cast_are_refused():
    with pytest.raises(UnsupportedError, match="nf4 weight stored as torch.bfloat16 was cast to torch.float16.*quant_storage"):
        cast(converted("nf4:bfloat16"))
    model = converted("nf4:bfloat16", selection=Drawn()).to(torch.float32)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    with pytest.raises(UnsupportedError, match="was cast to torch.float32"):
        LoSiA(model, optimizer, LoSiAConfig(rank_factor=0.25, selection=Drawn()))


def test_codes_that_an_evaluation_has_laid_out_anew_are_refused():
    model = quantize(tiny_llama(**SIZES), "nf4")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedError, match="layers.1.mlp.up_proj: an evaluation has laid the codes.*load the model again"):
        get_losia_model(model, LoSiAConfig())


def test_codes_stored_as_fp16_are_refused_with_the_setting():
    model = quantize(tiny_llama(**SIZES), "nf4:float16")
    with pytest.raises(UnsupportedError, match="layers.0.*codes are stored as torch.float16 .bnb_4bit_quant_storage.*uint8"):
        get_losia_model(model, LoSiAConfig())


def test_a_quantized_model_on_several_devices_is_refused():
    model = quantize(tiny_llama(**SIZES), "nf4")
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    with pytest.raises(UnsupportedError, match="by device_map .0, 1; 'model.layers.1' is not where.*device_map={'': device}"):
        get_losia_model(model, LoSiAConfig())
    model.hf_device_map = {"": "cpu"}
    get_losia_model(model, LoSiAConfig())


def test_layers_without_codes_yet_are_refused():
    import bitsandbytes as bnb

    model = tiny_llama(**SIZES)
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear4bit(48, 80, bias=False)
    with pytest.raises(UnsupportedError, match="layers.0.mlp.up_proj: .*no codes yet.*from_pretrained"):
        get_losia_model(model, LoSiAConfig())


class Gptq(nn.Module):
    """Packed weights of a kind that is not known."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 48, 80
        self.register_buffer("qweight", torch.zeros(6, 80, dtype=torch.int32))


def test_other_kinds_are_refused_by_name():
    model = tiny_llama(**SIZES)
    model.model.layers[0].mlp.up_proj = Gptq()
    with pytest.raises(ConfigError, match="up_proj.*Gptq"):
        get_losia_model(model, LoSiAConfig())


def test_a_form_without_a_quantized_base_or_an_unknown_one_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="retired='int8', but the model has no quantized layer"):
        get_losia_model(tiny_llama(), LoSiAConfig(retired="int8"))
    with pytest.raises(ConfigError, match="retired='int4': nf4, int8, bf16, fp32, stochastic, or null"):
        LoSiAConfig(retired="int4")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    model = quantize_without_bitsandbytes()
    with pytest.raises(ConfigError, match="retired='nf4' needs bitsandbytes: pip install bitsandbytes, or set retired: int8"):
        get_losia_model(model, LoSiAConfig(retired="nf4"))
    get_losia_model(model, LoSiAConfig())  # FP8 keeps what subnets leave in int8, which needs nothing


def quantize_without_bitsandbytes():
    from tests.support.quantized import _linears, fp8_linear

    model = tiny_llama(**SIZES)
    for name, linear in _linears(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fp8_linear(linear))
    return model


def test_experts_that_stay_as_they_are_are_named(caplog):
    model = quantize(tiny_model("mixture:qwen3_moe"), "nf4")
    with caplog.at_level("WARNING"):
        get_losia_model(model, LoSiAConfig(rank_factor=0.25, selection=Drawn()))
    assert "experts in fused weights (model.layers.0.mlp.experts.gate_up_proj, ...) are not: they take" in caplog.text
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(site.subnet.grad is not None for site in find_sites(model))
