"""fp32 subnets in frozen bf16 weights: the run that bf16 subnets with fp32 masters give, without the master copy."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from tests.support.cases import slow
from tests.support.models import batches, tiny_llama

CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3}
STEPS = 24


def train(engine: str, subnet_dtype: torch.dtype | None, param_dtype: torch.dtype | None = None) -> dict:
    """Losses, fp32 values that the optimizer updates, subnets' places and bytes of optimizer state, on every rank."""
    config = LoSiAConfig(**CONFIG)
    model = get_losia_model(tiny_llama().to(torch.bfloat16), config, subnet_dtype=subnet_dtype)
    world, rank = 1, 0
    if engine != "one":
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if engine == "ddp":
        model = DistributedDataParallel(model, broadcast_buffers=False)
    if engine == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        options = {"mesh": init_device_mesh("cpu", (world,)), "mp_policy": policy}
        for layer in model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=3e-3), lr=3e-3)
    losia = LoSiA(model, optimizer, config)
    losses = []
    data = batches(steps=3, micro_batches=1, batch=4, length=12, vocab=96, seed=7)
    for step in range(STEPS):
        (batch,) = data[step % 3]
        mine = {name: t.chunk(world)[rank] for name, t in batch.items()}
        loss = model(**mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    masters = {}
    for layer in losia.sites:
        holder = optimizer.state[layer.subnet].get("master", layer.subnet)
        masters[layer.name] = losia.parameters.read_whole(holder)
    result = {
        "losses": losses,
        "masters": masters,
        "places": {layer.name: (layer.row_index.clone(), layer.col_index.clone()) for layer in losia.sites},
        "copies": sum("master" in state for state in optimizer.state.values()),
        "state_elements": sum(t.numel() for t in losia.state.state_tensors()),
        "dtypes": {str(layer.weight.dtype) for layer in losia.sites},
    }
    losia.detach()
    return result


def assert_same(result: dict, expected: dict, tolerance: float) -> None:
    worst = max(abs(a - b) for a, b in zip(result["losses"], expected["losses"], strict=True))
    assert worst <= tolerance
    assert all(values.dtype == torch.float32 for values in result["masters"].values())
    if tolerance == 0:
        for name, (rows, columns) in expected["places"].items():
            assert torch.equal(result["places"][name][0], rows) and torch.equal(result["places"][name][1], columns)
            assert torch.equal(result["masters"][name], expected["masters"][name]), name


@pytest.fixture(scope="module")
def with_masters():
    return train("one", None)


def test_one_process_gives_the_same_bits_without_a_master_copy(with_masters):
    result = train("one", torch.float32)
    assert_same(result, with_masters, tolerance=0)
    assert result["dtypes"] == {"torch.bfloat16"}
    assert result["copies"] == 0 < with_masters["copies"]
    assert 3 * result["state_elements"] == 2 * with_masters["state_elements"]
    assert result["losses"][-1] < result["losses"][0] - 0.4


@pytest.mark.parametrize("engine, param_dtype", [("ddp", None), slow("fsdp2", None), ("fsdp2", torch.bfloat16)])
def test_two_ranks_stay_within_bf16_rounding_of_it(ranks, with_masters, engine, param_dtype):
    results = ranks(2, train, engine, torch.float32, param_dtype)
    mean = [sum(pair) / 2 for pair in zip(*(result["losses"] for result in results), strict=True)]
    assert_same({**results[0], "losses": mean}, with_masters, tolerance=0.02)
    assert results[0]["copies"] == 0
    for name, values in results[1]["masters"].items():
        assert torch.equal(values, results[0]["masters"][name]), name


def test_a_dtype_narrower_than_the_weights_is_refused():
    with pytest.raises(ConfigError, match=r"subnet_dtype=torch.bfloat16: .* has torch.float32 weights"):
        get_losia_model(tiny_llama(), LoSiAConfig(), subnet_dtype=torch.bfloat16)


def test_subnets_that_were_cast_away_afterwards_are_refused():
    model = get_losia_model(tiny_llama().to(torch.bfloat16), LoSiAConfig(), subnet_dtype=torch.float32).to(torch.bfloat16)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    with pytest.raises(UnsupportedError, match=r"asked for in torch.float32 .* and is in torch.bfloat16"):
        LoSiA(model, optimizer, LoSiAConfig())


def start_in_bf16() -> None:
    from losia_dist import initialize

    model = get_losia_model(tiny_llama().to(torch.bfloat16), LoSiAConfig(), subnet_dtype=torch.float32)
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    initialize(model=model, losia_config=LoSiAConfig(), config=settings)


def test_deepspeed_which_casts_them_is_told_to_leave_it_out(ranks):
    for kind, message in ranks.errors(2, start_in_bf16):
        assert kind == "UnsupportedError" and "with DeepSpeed leave subnet_dtype out" in message
