"""Quantized experts: what subnets leave beside their codes, how they are read, and what is refused."""

from __future__ import annotations

import copy
import weakref
from math import prod

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from losia_dist import Drawn, LoSiAConfig, get_losia_model
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet import four_bits
from losia_dist.subnet.access import read_subnet, write_back
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.experts_overlay import ExpertsOverlay
from losia_dist.subnet.layout import Layout
from losia_dist.subnet.packed import packed_weights
from losia_dist.subnet.packed_kinds import FourBit
from tests.support.families import tiny_model
from tests.support.quantized import dequantized, quantize
from tests.unit.test_packed import KEPT

FORMS = ["nf4:experts", "nf4:double:experts", "nf4:bfloat16:experts", "fp4:experts", "fp8:experts"]
TOKENS = torch.arange(3, 35).reshape(2, 16)


def model_of(form: str, family: str = "qwen3_moe"):
    return quantize(tiny_model(f"mixture:{family}"), form)


def converted(form: str, family: str = "qwen3_moe", **config):
    settings = {"rank_factor": 0.25, "selection": Drawn(), **config}
    return get_losia_model(model_of(form, family), LoSiAConfig(**settings))


def expert_sites(model):
    return [site for site in find_sites(model) if site.experts is not None]


CASES = [(form, "qwen3_moe") for form in FORMS] + [("nf4:double:experts", "gpt_oss")]


@pytest.mark.parametrize("form, family", CASES)
def test_experts_are_held_in_codes_and_read_as_their_values(form, family):
    model, plain = converted(form, family), dequantized(model_of(form, family))
    access, sites = resolve_parameters(model), expert_sites(model)
    assert len(sites) == 4 and {site.name for site in sites} <= packed_weights(model).keys()
    for site in sites:
        expected = plain.get_parameter(site.name).data
        assert access.shape(site.weight) == tuple(expected.shape) and not site.weight.requires_grad
        per_value = site.weight.nbytes / expected.numel()
        assert per_value == pytest.approx(1 if form.startswith("fp8") else 0.5, abs=1e-3)
        torch.testing.assert_close(access.read_whole(site.weight), expected, rtol=0, atol=1e-7)
        matrices = site.as_rows(expected)
        for place, expert in enumerate(matrices):
            block = read_subnet(access, site, site.row_index, site.col_index)[place]
            rows, columns = site.row_index[place], site.col_index[place]
            torch.testing.assert_close(block, expert[rows][:, columns], rtol=0, atol=1e-7)


@pytest.mark.parametrize("form, family", [("nf4:double:experts", "gpt_oss"), ("fp8:experts", "qwen3_moe")])
def test_a_base_in_bf16_reads_the_same_block_by_block_and_whole(form, family):
    model = model_of(form, family)
    for module in model.modules():
        for step in getattr(module, "parametrizations", {}).values():
            step[0].quant_state.dtype = torch.bfloat16
    model.model.norm.to(torch.bfloat16), model.model.embed_tokens.to(torch.bfloat16)
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, target_modules=["gate_up_proj", "down_proj"], experts_per_slot=2))
    access = resolve_parameters(model)
    for site in expert_sites(model):
        assert site.subnet.dtype == torch.bfloat16 and site.count_tokens().numel() <= 2
        left = torch.randn(site.subnet.shape).mul_(0.01).bfloat16() + site.subnet.data
        write_back(access, site, site.row_index, site.col_index, left)
        dense = site.as_rows(site.packed.dense(site.weight, torch.bfloat16))
        block = read_subnet(access, site, site.row_index, site.col_index)
        found = torch.stack([w[r][:, c] for w, r, c in zip(dense, site.row_index, site.col_index, strict=True)])
        assert torch.equal(found, block) and not torch.equal(block, site.subnet)


@pytest.mark.parametrize("double", [False, True])
def test_weights_of_more_values_than_bitsandbytes_counts_are_cut(monkeypatch, double):
    values = torch.randn(5, 30, 22, dtype=torch.bfloat16)
    codes, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=double)
    whole = FourBit(state, torch.uint8, "nf4", Layout(experts=(0, 5)))
    expected = whole.decode(codes, torch.float32)
    monkeypatch.setattr(four_bits, "_AT_ONCE", 1024)
    for storage in (torch.uint8, torch.bfloat16):
        cut, its = four_bits.quantize_4bit(values, "nf4", double=double, storage=storage)
        packed = FourBit(its, storage, "nf4", Layout(experts=(0, 5)))
        assert cut.dtype == storage and packed.print_of(cut) == whole.print_of(codes) and packed.figures() == whole.figures()
        assert torch.equal(packed.decode(cut, torch.float32), expected) and packed.describe() == whole.describe()


def some_places(E: int, size: int, kept: int) -> torch.Tensor:
    return torch.stack([torch.randperm(size)[:kept].sort().values for _ in range(E)])


@pytest.mark.parametrize("form", KEPT)
def test_what_subnets_leave_adds_up_for_each_expert(form):
    E, m, n = 5, 40, 60
    overlay, matrices = ExpertsOverlay((E, m, n), form), torch.randn(E, n, m).transpose(1, 2)
    expected = matrices.clone()
    for experts, r, c in ((5, 4, 6), (2, 40, 7), (3, 5, 60), (5, 3, 4), (5, 40, 2)):
        index = torch.arange(E)[-experts:], some_places(experts, m, r), some_places(experts, n, c)
        difference = torch.randn(experts, r, c)
        overlay.add(*index, difference)
        kept = KEPT[form](difference.view(-1, c)).view_as(difference)
        for place, expert in enumerate(index[0].tolist()):
            expected[expert][index[1][place][:, None], index[2][place]] += kept[place]
    assert len(overlay) == 5
    found = overlay.add_to(matrices.clone(memory_format=torch.preserve_format))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    wanted = torch.tensor([1, 3, 4])
    rows, columns = some_places(3, m, 9), some_places(3, n, 11)
    places = wanted.view(-1, 1, 1), rows.unsqueeze(-1), columns.unsqueeze(-2)
    assert torch.equal(overlay.add_to_block(matrices[places].clone(), wanted, rows, columns), found[places])


@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("shape", [(40, 16, 32), (3, 5, 7)])
def test_more_than_all_matrices_become_one_difference_of_them(form, shape):
    E, m, n = shape
    overlay, expected = ExpertsOverlay(shape, form), torch.zeros(shape)
    for place in range(24):
        experts = torch.arange(E)[: E if place % 2 else -(-E // 2)]
        index = some_places(len(experts), m, -(-m // 2)), some_places(len(experts), n, -(-n // 3))
        difference = torch.randn(len(experts), -(-m // 2), -(-n // 3)) * 1e-3
        overlay.add(experts, *index, difference)
        for at, expert in enumerate(experts.tolist()):
            expected[expert][index[0][at][:, None], index[1][at]] += difference[at]
    whole = {"nf4": 0.54, "int8": 1 + 4 / n, "bf16": 2, "fp32": 4}[form] * expected.numel()
    assert any(one.rows is None and one.columns is None and one.experts is None for one in overlay.read())
    assert overlay.nbytes <= whole + 64
    found = overlay.add_to(torch.zeros(shape))
    assert (found - expected).norm() / expected.norm() < {"nf4": 0.45, "int8": 0.05, "bf16": 0.03, "fp32": 1e-6}[form]
    every = [torch.arange(size).expand(E, -1).contiguous() for size in (m, n)]
    assert torch.equal(overlay.add_to_block(torch.zeros(shape), torch.arange(E), *every), found)


def test_random_rounding_gives_neighbouring_codes_and_changes_nothing_else():
    model = converted("nf4:experts", "gpt_oss", retired="stochastic")
    access, site = resolve_parameters(model), expert_sites(model)[0]
    before = site.as_rows(site.packed.dense(site.weight, torch.float32)).clone()
    places = torch.arange(5).view(-1, 1, 1), site.row_index.unsqueeze(-1), site.col_index.unsqueeze(-2)
    values, codes = (before[places] * 0.9).contiguous(), site.weight.data.clone()
    total, step = torch.zeros_like(values), before.abs().max() / 4
    for _ in range(60):
        site.weight.data.copy_(codes)
        write_back(access, site, site.row_index, site.col_index, values)
        after = site.as_rows(site.packed.dense(site.weight, torch.float32)).clone()
        total += after[places]
        after[places] = before[places]
        assert torch.equal(after, before)
    assert (total / 60 - values).abs().mean() < 0.03 * step


class LargeTensors(TorchDispatchMode):
    """How many tensors of at least so many bytes are there at a time, of those that operators make.

    Views of one memory count once.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found, self.most = size, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                self.found.append(weakref.ref(tensor))
        here = {one().untyped_storage().data_ptr() for one in self.found if one() is not None}
        self.most = max(self.most, len(here - self.known))
        return made

    def watch(self, model) -> None:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("is_folded", [False, True])
def test_one_weight_is_dense_at_a_time_and_no_other_temporary_is_as_large(is_folded):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 32, "num_hidden_layers": 2, "head_dim": 16}
    model = quantize(tiny_model("qwen3_moe", **sizes), "nf4:double:experts")
    config = LoSiAConfig(rank_factor=0.125, selection=Drawn(), retired="nf4")
    get_losia_model(model, config)
    access = resolve_parameters(model)
    for site in expert_sites(model):
        if is_folded:
            site.packed.overlay.write([site.packed.overlay._folded(torch.device("cpu"))])
        for _ in range(2):
            write_back(access, site, site.row_index, site.col_index, site.subnet.data * 1.1)
    smallest = min(prod(site.packed.shape) * 4 for site in expert_sites(model))
    large = LargeTensors(smallest // 2)
    large.watch(model)
    with large:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert large.most == 1 and large.found


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj"]])
def test_experts_without_subnets_compute_from_their_codes_and_give_their_inputs_a_gradient(targets):
    model, plain = model_of("nf4:double:experts"), dequantized(model_of("nf4:double:experts"))
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, target_modules=targets))
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=1e-5)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for site in find_sites(model):
        full = plain.get_parameter(site.name if site.experts else f"{site.name}.weight").grad
        expected = full[site.layout.places(tuple(full.shape), site.row_index, site.col_index)]
        torch.testing.assert_close(site.subnet.grad, expected, rtol=0, atol=1e-6)


def test_a_copy_keeps_computing_what_the_model_did():
    model = converted("nf4:double:experts")
    before, made = model(TOKENS).logits, copy.deepcopy(model)
    for site in expert_sites(model):
        write_back(resolve_parameters(model), site, site.row_index, site.col_index, site.subnet.data * 1.5)
        site.subnet.data.mul_(1.5)
    assert torch.equal(made(TOKENS).logits, before) and not torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("form", ["nf4:experts", "nf4:bfloat16:experts", "fp8:experts"])
def test_the_model_is_as_it_was_when_the_configuration_is_refused(form):
    model = model_of(form)
    state, kinds = dict(model.state_dict()), [type(module) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ConfigError, match="no module is named 'nothing'"):
        get_losia_model(model, LoSiAConfig(target_modules=["nothing"]))
    assert kinds == [type(module) for module in model.modules()]
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert state.keys() == model.state_dict().keys()
    get_losia_model(model, LoSiAConfig(rank_factor=0.25))
    assert len(expert_sites(model)) == 4


def test_nothing_of_the_quantizer_stays_in_experts():
    model = converted("nf4:experts")
    for module in {site.module for site in expert_sites(model)}:
        assert not parametrize.is_parametrized(module) and "parametrizations" not in module._modules
        assert not (module._forward_hooks or module._forward_pre_hooks or module._state_dict_hooks)
    assert all(".absmax" not in name for name in model.state_dict())


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def replaced(model):
    model.model.layers[1].mlp.experts.forward = lambda *_: None


def parametrized(model):
    parametrize.register_parametrization(model.model.layers[1].mlp.experts, "down_proj", Doubled(), unsafe=True)


def laid_out_anew(model):
    held = model.model.layers[1].mlp.experts.parametrizations
    held.down_proj[0].quant_state.packing_format_for_cpu = True


def in_halves(model):
    experts = model.model.layers[1].mlp.experts
    experts._parameters["down_proj"] = nn.Parameter(experts._parameters["down_proj"].data.view(torch.int8), False)


def uneven(model):
    experts = model.model.layers[1].mlp.experts
    experts._parameters["down_proj_scale_inv"] = nn.Parameter(torch.ones(5, 7, 3), False)


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("nf4:experts", replaced, "layers.1.mlp.experts: experts with quantized weights: .* has its forward replaced"),
        ("nf4", parametrized, "layers.1.mlp.experts: down_proj is computed from other tensors .Doubled.: remove"),
        ("nf4:experts", laid_out_anew, "layers.1.mlp.experts: an evaluation has laid the codes.*load the model again"),
        ("fp8:experts", in_halves, "layers.1.mlp.experts: down_proj holds torch.int8: only float8_e4m3fn"),
        ("fp8:experts", uneven, "layers.1.mlp.experts: down_proj: 36 rows in 7 blocks of FP8, which do not divide them"),
    ],
)
def test_experts_that_cannot_be_read_are_refused_by_name(form, change, message):
    model = model_of(form)
    change(model)
    with pytest.raises(UnsupportedError, match=message):
        get_losia_model(model, LoSiAConfig(rank_factor=0.25))


def test_quantized_experts_are_not_trained_in_full():
    with pytest.raises(ConfigError, match="'model.layers.0.mlp.experts' .*experts.gate_up_proj' is quantized"):
        get_losia_model(
            model_of("nf4:experts"),
            LoSiAConfig(rank_factor=0.25, target_modules=["q_proj"], modules_to_save=["mlp.experts"]),
        )


def test_a_state_dict_which_lacks_what_subnets_left_is_refused():
    model = converted("nf4:double:experts")
    access, site = resolve_parameters(model), expert_sites(model)[0]
    model.load_state_dict(model.state_dict())
    write_back(access, site, site.row_index, site.col_index, site.subnet.data * 1.5)
    with pytest.raises(UnsupportedError, match="gate_up_proj is quantized, and what subnets left.*goes on by load_checkpoint"):
        model.load_state_dict(model.state_dict())
