"""What an earlier version took is refused by name, with what to use now; the value that was kept passes."""

import os

import pytest
import torch.distributed as dist

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError
from losia_dist.removed import refuse_removed_variables
from tests.support.models import tiny_llama


def conductor():
    model, config = tiny_llama(), LoSiAConfig(rank_factor=0.25)
    get_losia_model(model, config)
    return LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)


@pytest.mark.parametrize("value", ["auto", "write", "write,gradient"])
def test_a_variable_that_asks_for_the_kernels_is_refused(monkeypatch, value):
    monkeypatch.setenv("LOSIA_KERNELS", value)
    with pytest.raises(ConfigError, match=rf"LOSIA_KERNELS={value}: the Triton kernels were removed.*Unset LOSIA_KERNELS"):
        conductor()


def test_a_variable_that_asks_for_none_passes():
    refuse_removed_variables({"LOSIA_KERNELS": "none"})
    refuse_removed_variables({})


def with_kernels_on_the_second_rank():
    if dist.get_rank() == 1:
        os.environ["LOSIA_KERNELS"] = "write"
    try:
        conductor()
    finally:
        os.environ.pop("LOSIA_KERNELS", None)


def test_a_variable_of_one_rank_stops_them_all(ranks):
    for kind, message in ranks.errors(2, with_kernels_on_the_second_rank):
        assert kind == "ConfigError" and "LOSIA_KERNELS is 'none' on rank 0 and 'write' on rank 1" in message
