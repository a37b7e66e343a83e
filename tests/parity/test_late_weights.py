"""Models without whole weights at conversion: on the meta device, and partitioned by deepspeed.zero.Init as they are built."""

from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites
from tests.support import training
from tests.support.compare import assert_same_run
from tests.support.models import tiny_llama
from tests.support.training import Run, reference

RUN = Run(steps=20)


def converted_on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        model = tiny_llama(**RUN.model)
    return get_losia_model(model, LoSiAConfig(**RUN.config)).train()


def load(model: torch.nn.Module) -> None:
    """Give memory and the usual weights to a model that was made on the meta device."""
    model.to_empty(device="cpu")
    for layer in find_sites(model):
        layer.row_index.fill_(-1)  # whatever memory holds: nothing may rest on it
        layer.col_index.fill_(-1)
    whole = tiny_llama(**RUN.model)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, whole.state_dict(), options=options)
    for name, buffer in whole.named_buffers():
        model.get_buffer(name).copy_(buffer)  # rotary frequencies are in no state dict


def train_from_meta(engine: str) -> dict:
    def loop(engine, model, config, run):
        model = converted_on_meta()
        if engine == "fsdp2":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        load(model)
        with (
            mock.patch.object(training, "get_losia_model", lambda model, config: model),
            mock.patch.object(training, "_wrap", lambda engine, model, dtype: model),
        ):
            return plain(engine, model, config, run)

    plain = training._plain_loop
    with mock.patch.object(training, "_plain_loop", loop):
        return training.train(engine, RUN)


@pytest.mark.parametrize("engine, world_size", [("one", 1), ("fsdp2", 2)])
def test_a_model_converted_on_the_meta_device_trains_as_one_converted_with_its_weights(ranks, engine, world_size):
    results = [train_from_meta(engine)] if world_size == 1 else ranks(world_size, train_from_meta, engine)
    for result in results:
        assert_same_run(result, reference(RUN))


def test_a_model_that_stayed_on_the_meta_device_is_refused():
    model = converted_on_meta()
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    with pytest.raises(ConfigError, match=r"still on the meta device: .*to_empty\(device=...\) and load the weights"):
        LoSiA(model, optimizer, LoSiAConfig(**RUN.config))


def train_built_in_parts() -> dict:
    import deepspeed

    def build(run):
        whole = tiny_llama(**run.model)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = type(whole)(whole.config)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for name, parameter in model.named_parameters():
                parameter.data.copy_(whole.get_parameter(name).data)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        return model

    with mock.patch.object(training, "build", build):
        return training.train("zero3", RUN)


def test_a_model_built_in_parts_is_converted_shard_by_shard(ranks):
    expected = reference(RUN)
    for result in ranks(2, train_built_in_parts):
        assert_same_run(result, expected)
