"""Quantized linear layers of other kinds are refused at the start: by a tensor's class, its dtype, or a class of their own."""

import pytest
import torch
from torch import nn

from losia_dist import LoSiAConfig, get_losia_model
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites


def by_torchao(name: str) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(64, 64, dtype=torch.bfloat16)
    quantization.quantize_(linear, getattr(quantization, name)())
    return linear


def in_float8() -> nn.Linear:
    return nn.Linear(64, 64).to(torch.float8_e4m3fn)


class QuantLinear(nn.Module):
    """As GPTQ's, AWQ's and HQQ's layers are: no nn.Linear, and the weight in packed whole numbers."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 64
        self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))


KINDS = {
    "int8": lambda: by_torchao("Int8WeightOnlyConfig"),
    "float8 of torchao": lambda: by_torchao("Float8WeightOnlyConfig"),
    "float8": in_float8,
    "packed": QuantLinear,
}


@pytest.mark.parametrize("targets", ["all-linear", ["odd"], ".*odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_is_refused_with_the_fix(kind, targets):
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "odd": KINDS[kind]()})
    with pytest.raises(ConfigError, match=r"'odd'.*oad the model unquantized"):
        get_losia_model(model, LoSiAConfig(target_modules=targets))
    assert not find_sites(model)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_quantized_layers_that_stay_frozen_others_train_by_name(kind):
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "odd": KINDS[kind]()})
    assert [layer.name for layer in find_sites(get_losia_model(model, LoSiAConfig(target_modules=["plain"])))] == ["plain"]
