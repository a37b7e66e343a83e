"""FP8 products of one layer: the rule of docs/algorithm.md, its limits, what cuBLASLt asks for, and what is refused."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, DivergenceError, UnsupportedError
from losia_dist.subnet import float8
from losia_dist.subnet.convert import find_sites
from tests.reference.float8 import E4M3, E5M2, compute_in_float8, rounded
from tests.support.models import batches, tiny_llama

CONFIG = LoSiAConfig(rank_factor=0.25, weight_products="fp8")
SIZES = {"hidden_size": 48, "intermediate_size": 80}


def layer_pair(kind=nn.Linear, m=48, n=32, bias=True, factor=0.25):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(n, m, bias=bias) if kind is nn.Linear else Conv1D(m, n))
    converted = get_losia_model(copy.deepcopy(dense), LoSiAConfig(rank_factor=factor, weight_products="fp8"))
    assert compute_in_float8(dense, ["0.weight"], ["0.weight"] if kind is Conv1D else []) == ["0.weight"]
    return dense[0], converted[0]


@pytest.mark.parametrize("shape", [(7,), (2, 5), (), (0,)])
@pytest.mark.parametrize("kind, bias", [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
@pytest.mark.parametrize("localizing", [False, True])
def test_a_layer_computes_by_the_rule(kind, bias, shape, localizing):
    dense, layer = layer_pair(kind, bias=bias)
    seen = []
    if localizing:
        layer.site.gradient_sink = lambda gradient, weight: seen.append((gradient.clone(), weight.clone()))
    stored = layer.weight.t() if kind is Conv1D else layer.weight
    with torch.no_grad():  # a subnet that has moved since it was cut out
        layer.subnet.add_(0.5)
        turned = dense.weight.t() if kind is Conv1D else dense.weight
        turned[layer.row_index[:, None], layer.col_index] += 0.5
    x = torch.randn(*shape, 32) * 3
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(b)
    turned = dense.weight.t() if kind is Conv1D else dense.weight
    expected = dense.forward(a) if x.numel() else nn.functional.linear(a, turned, dense.bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    upstream = torch.randn_like(y) * 1e-4
    expected.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-9)
    full = dense.weight.grad.t() if kind is Conv1D else dense.weight.grad
    torch.testing.assert_close(layer.subnet.grad, full[layer.row_index][:, layer.col_index], rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    if localizing:
        torch.testing.assert_close(seen[0][0], full, rtol=1e-5, atol=1e-9)
        assert torch.equal(seen[0][1], stored)  # as it is kept, not rounded


def test_bf16_operands_are_rounded_once():
    _, layer = layer_pair()
    x = torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the weight stays fp32
        y = layer(x)
    expected = rounded(x.bfloat16(), E4M3) @ rounded(layer.weight.detach(), E4M3).t() + layer.bias.detach().bfloat16().float()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-6)
    layer.bfloat16()
    x = x.bfloat16().requires_grad_()
    layer(x).backward(torch.full((64, 48), 1e-3, dtype=torch.bfloat16))
    dy = rounded(torch.full((64, 48), 1e-3, dtype=torch.bfloat16), E5M2)
    torch.testing.assert_close(x.grad.float(), dy @ rounded(layer.weight.detach(), E4M3), rtol=2**-8, atol=1e-9)


class Multiplied(TorchDispatchMode):
    """Dtypes of what is multiplied elementwise."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mul.Tensor:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_evaluation_in_fp16_scales_in_fp32():
    """A GPU would make a scale of 2^26 one of fp16's, which is infinite; a CPU does not."""
    _, layer = layer_pair()
    x = torch.randn(8, 32) * 1e-6
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16), Multiplied() as multiplied:
        y = layer(x)
    assert multiplied.dtypes == {torch.float32}
    expected = rounded(x.half(), E4M3) @ rounded(layer.weight.detach(), E4M3).t() + layer.bias
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form, reference", [(torch.float8_e4m3fn, E4M3), (torch.float8_e5m2, E5M2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 447.0, 448.0, 449.0, 1e30])
def test_rounding_is_the_references_to_the_last_bit(form, reference, dtype, size):
    torch.manual_seed(0)
    values = (torch.randn(16, 512) * torch.logspace(-6, 0, 512)).to(dtype)
    values = (values / values.abs().max() * size).to(dtype)
    values[0, :2] = torch.tensor([size, -size])
    values.clamp_(-size, size)
    found, back = float8._rounded(values, form)
    assert found.dtype == form and found.is_contiguous()
    assert torch.equal(found.float() * back, rounded(values, reference))
    assert found.float().abs().max() >= torch.finfo(form).max / 2  # a power of two more would be too much


def test_many_blocks_are_one(monkeypatch):
    values = torch.randn(33, 48)
    whole, back = float8._rounded(values.t(), torch.float8_e4m3fn)
    monkeypatch.setattr(float8, "_BLOCK", 100)
    parts, again = float8._rounded(values.t(), torch.float8_e4m3fn)
    assert whole.shape == (48, 33) and torch.equal(whole.float(), parts.float()) and torch.equal(back, again)


@pytest.mark.parametrize("top", [8, 15])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 1.0, 1.75, math.nextafter(1.75, 2.0), 3e38])
def test_scales_are_powers_of_two_that_the_device_can_hold(top, largest):
    largest = torch.tensor(largest)
    scale, back = float8._scales(largest, top)
    mantissa, exponent = torch.frexp(scale)
    assert mantissa == 0.5 and scale * back == 1 and abs(exponent.item() - 1) <= 126
    if largest > 1e-30:
        assert largest * scale <= 1.75 * 2.0**top < 2 * largest * scale


def test_zeros_stay_zeros():
    _, layer = layer_pair(bias=False)
    x = torch.zeros(3, 32, requires_grad=True)
    y = layer(x)
    y.backward(torch.zeros_like(y))
    assert torch.equal(y, torch.zeros(3, 48)) and torch.equal(x.grad, torch.zeros(3, 32))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value):
    _, layer = layer_pair()
    x = torch.randn(3, 32)
    x[1, 2] = value
    assert layer(x).isnan().all()
    x = torch.randn(3, 32, requires_grad=True)
    upstream = torch.randn(3, 48)
    upstream[1, 2] = value
    layer(x).backward(upstream)
    assert x.grad.isnan().all()


def run_of(config=CONFIG, **sizes):
    model = tiny_llama(**(SIZES | sizes))
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    return model, optimizer, LoSiA(model, optimizer, config)


def test_a_step_that_is_not_finite_is_caught():
    model, optimizer, losia = run_of()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = math.inf
    batch = batches(1, 1, 2, 8, 96, seed=0)[0][0]
    model(**batch, use_cache=False).loss.backward()
    optimizer.step()
    with pytest.raises(DivergenceError):
        losia.step()
        losia.check_latest_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_product_gets_the_layout_that_it_takes(dtype, monkeypatch):
    """Row by column, multiples of 16, fp32 scales, no bias for an fp32 result: torch's own checks of fake tensors on a GPU."""
    given = []
    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: given.append(k["bias"]) or product(*a, **k))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)  # which torch without CUDA has not for fake tensors
    with FakeTensorMode():
        weight = torch.empty(48, 32, dtype=dtype, device="cuda")
        for matrix in (weight, torch.empty(32, 48, dtype=dtype, device="cuda").t()):
            bias = torch.empty(48, dtype=dtype, device="cuda")
            y = float8.float8_linear(torch.empty(2, 3, 32, dtype=dtype, device="cuda"), matrix, bias)
            dx = float8.float8_input_gradient(torch.empty(2, 3, 48, dtype=dtype, device="cuda"), matrix)
            assert (y.shape, y.dtype, dx.shape, dx.dtype) == ((2, 3, 48), dtype, (2, 3, 32), dtype)
    assert [bias is None for bias in given] == [dtype == torch.float32, True] * 2


def test_only_what_can_computes_so_and_the_rest_is_named_once(caplog):
    config = LoSiAConfig(rank_factor=0.25, output_rank_factor=0.25, weight_products="fp8")
    with caplog.at_level(logging.WARNING):
        model, _, _ = run_of(config, intermediate_size=77)
    inside = {site.name.split(".")[-1]: site.in_float8 for site in find_sites(model)}
    assert [name for name, is_inside in inside.items() if not is_inside] == ["gate_proj", "up_proj", "down_proj", "lm_head"]
    lines = [record.getMessage() for record in caplog.records if "weight_products" in record.getMessage()]
    assert len(lines) == 2 and "(9 in all): sizes that 16 does not divide" in lines[0] and "lm_head (1 in all)" in lines[1]


def test_a_copy_computes_as_the_model_does():
    _, layer = layer_pair()
    assert copy.deepcopy(layer).site.in_float8


BAD = ["float8", "FP8", True, 8, "bf16"]


@pytest.mark.parametrize("value", BAD)
def test_another_value_is_refused(value):
    with pytest.raises(ConfigError, match=rf"weight_products={value!r}: fp8, or null\."):
        LoSiAConfig(weight_products=value)


def test_a_model_without_such_a_layer_is_refused_and_left_as_it_was():
    model = tiny_llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"no target layer can compute so \(sizes that 16 .*layers\.0.*: leave it out"):
        get_losia_model(model, CONFIG)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("here, there", [("fp8", None), (None, "fp8")])
def test_a_configuration_that_the_model_was_not_converted_with_is_refused(here, there):
    model = tiny_llama(**SIZES)
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, weight_products=there))
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    with pytest.raises(ConfigError, match=f"weight_products={here!r}, but the model was converted with {there!r}"):
        LoSiA(model, optimizer, LoSiAConfig(rank_factor=0.25, weight_products=here))


def test_devices_without_fp8_are_refused(monkeypatch):
    cuda = torch.device("cuda")
    float8.refuse_device(torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="mps devices were not tried"):
        float8.refuse_device(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UnsupportedError, match=r"A100 has compute capability 8\.0 .*8\.9 or newer.*leave weight_products out"):
        float8.refuse_device(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    float8.refuse_device(cuda)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UnsupportedError, match="ROCm take other FP8 formats"):
        float8.refuse_device(cuda)


def test_a_run_asks_for_its_device(monkeypatch):
    def refuse(device):
        raise UnsupportedError(f"{device} was asked for")

    monkeypatch.setattr("losia_dist.run.checks.refuse_device", refuse)
    with pytest.raises(UnsupportedError, match="cpu was asked for"):
        run_of()
