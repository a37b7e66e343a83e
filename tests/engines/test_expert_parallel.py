"""What experts that are spread over ranks are refused with, before anything is trained; the gradients' norm on two meshes."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.distributed.configuration_utils import DistributedConfig

from losia_dist import (
    Drawn,
    Located,
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    clip_grad_norm_,
    get_losia_model,
    load_distributed_model,
    losia_parameter_groups,
)
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.sharding.expert_parallel import check_experts
from losia_dist.sharding.fully_shard import FullyShardParameters
from losia_dist.subnet.convert import find_sites
from tests.parity.test_expert_parallel import Case, save_model
from tests.support.families import tiny_model

PLAIN = LoSiAConfig(rank_factor=0.25, period=2)
SPREAD = {"fsdp_size": 4, "ep_size": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return save_model(Case(model={"num_experts": 6}), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "config, parallelism, message",
    [
        (PLAIN, {"tp_size": 2, "fsdp_size": 2}, r"tp_size=2\).*tensor parallelism.*Leave tp_size out"),
        (PLAIN, {"pp_size": 2}, r"pp_size=2\).*pipeline parallelism"),
        (PLAIN, {**SPREAD, "ep_implementation": "all_reduce"}, "ep_implementation='all_reduce'.*set 'all_to_all'"),
        (PLAIN, {**SPREAD, "fsdp_cpu_offload": True}, "fsdp_cpu_offload=True.*leave it out"),
        (LoSiAConfig(selection=Located(reduction="by_rank")), SPREAD, "reduction='by_rank'.*use reduction='reduced'"),
        (LoSiAConfig(selection=Located(start="importance")), SPREAD, "start='importance'.*leave it out"),
        (LoSiAConfig(selection=Drawn(outlier_limit=4)), SPREAD, "outlier_limit=4.*leave it out"),
    ],
)
def test_what_spread_experts_do_not_go_with_is_refused_before_a_model_is_looked_for(config, parallelism, message):
    with pytest.raises(UnsupportedError, match=message):
        load_distributed_model("no such directory", config, DistributedConfig(**parallelism))


@pytest.mark.parametrize("settings, message", [(DistributedConfig(), "at least two ranks"), ("fsdp", "is a str: pass")])
def test_a_configuration_that_distributes_nothing_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_distributed_model("no such directory", PLAIN, settings)


def test_counts_parts_and_kinds_that_cannot_be_spread_are_refused(directory):
    model = get_losia_model(AutoModelForCausalLM.from_pretrained(directory), PLAIN)
    with pytest.raises(
        UnsupportedError, match="ep_size=4 does not divide the 6 experts of model.layers.0.mlp.experts.gate_up_"
    ):
        check_experts(find_sites(model), 4, 4)
    with pytest.raises(
        UnsupportedError, match="fsdp_size=8, ep_size=2 cut 3 experts .* over 4 ranks, which leaves one without"
    ):
        check_experts(find_sites(model), 8, 2)
    parts = LoSiAConfig(rank_factor=0.25, experts_per_slot=3)
    model = get_losia_model(AutoModelForCausalLM.from_pretrained(directory), parts)
    with pytest.raises(UnsupportedError, match=r"gate_up_proj\[0:3\] localizes apart.*Leave experts_per_slot out"):
        check_experts(find_sites(model), 4, 2)
    check_experts(find_sites(model), 3, 1)


def load(directory: str, config: LoSiAConfig, parallelism: dict[str, int]):
    return load_distributed_model(directory, config, DistributedConfig(**parallelism))


def train_with(model: nn.Module, config: LoSiAConfig, **more) -> LoSiA:
    return LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config, **more)


def load_too_many(directory: str) -> None:
    load(directory, PLAIN, {"fsdp_size": 4, "ep_size": 4})


def train_tied_output(directory: str) -> None:
    config = LoSiAConfig(rank_factor=0.25, period=2, output_rank_factor=0.25)
    load_distributed_model(directory, config, DistributedConfig(**SPREAD), tie_word_embeddings=True)


def load_quantized(directory: str) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True)
    load_distributed_model(directory, PLAIN, DistributedConfig(**SPREAD), quantization_config=settings)


def convert_late(directory: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(**SPREAD))
    get_losia_model(model, PLAIN)


def go_by_rank(directory: str) -> None:
    train_with(load(directory, PLAIN, SPREAD), LoSiAConfig(rank_factor=0.25, period=2, selection=Located(reduction="by_rank")))


def train_by_half(directory: str) -> None:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    train_with(load(directory, PLAIN, SPREAD), PLAIN, process_group=halves[dist.get_rank() // 2])


def calibrate(directory: str) -> None:
    tokens = torch.arange(8).view(1, 8)
    train_with(load(directory, PLAIN, SPREAD), PLAIN).locate([{"input_ids": tokens, "labels": tokens}])


def train_in_full_within(directory: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    experts = nn.Module()
    experts.norm = nn.LayerNorm(8)
    FullyShardParameters(fully_shard(experts, mesh=mesh["efsdp"]))


@pytest.mark.parametrize(
    "function, kind, message",
    [
        (train_tied_output, "UnsupportedError", "output_rank_factor=0.25: lm_head shares its weight with the input embedding"),
        (load_quantized, "UnsupportedError", "load_distributed_model of a quantized Qwen3MoeForCausalLM.*Leave quantization_"),
        (load_too_many, "UnsupportedError", "ep_size=4 does not divide the 6 experts"),
        (
            convert_late,
            "ConfigError",
            "is spread over ranks already .expert parallelism.: use losia_dist.load_distributed_model",
        ),
        (go_by_rank, "UnsupportedError", "reduction='by_rank'"),
        (train_by_half, "UnsupportedError", "process_group has 2 of 4 ranks.*leave process_group out"),
        (calibrate, "UnsupportedError", "calibration is by micro-batch.*leave losia.locate"),
        (train_in_full_within, "UnsupportedError", "norm.weight trains in full within experts that are spread over ranks"),
    ],
)
def test_every_rank_is_refused_alike(ranks, directory, function, kind, message):
    found = ranks.errors(4, function, directory)
    assert {name for name, _ in found} == {kind}
    assert len({text for _, text in found}) == 1
    assert re.search(message, found[0][1])


def norms_on_two_meshes() -> list[tuple[float, float]]:
    """(what is returned, the whole gradients' norm afterwards) of one model cut in two ways, clipped and not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 3))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[1], mesh=mesh["shard"])
    found = []
    for limit in (0.25, 1e6):
        for parameter in model.parameters():
            whole = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
            if hasattr(parameter, "placements"):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.grad = whole
        norm = clip_grad_norm_(model.parameters(), limit)
        parts = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        found.append((norm.item(), torch.stack([part.square().sum() for part in parts]).sum().sqrt().item()))
    return found


def test_gradients_on_several_meshes_are_clipped_by_their_whole_norm(ranks):
    sizes = (35, 5, 15, 3, 9, 3)
    expected = torch.cat([torch.linspace(-1, 1, size) for size in sizes]).norm().item()
    for found in ranks(4, norms_on_two_meshes):
        (first, clipped), (second, free) = found
        assert first == second == pytest.approx(expected)
        assert (clipped, free) == (pytest.approx(0.25, rel=1e-4), pytest.approx(expected))


def test_clipping_alone_is_as_torch_does_it():
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    for model in (ours, theirs):
        tokens = torch.arange(8).view(1, 8)
        model(input_ids=tokens, labels=tokens).loss.backward()
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    torch.testing.assert_close(clip_grad_norm_(ours.parameters(), 0.1), expected)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    with pytest.raises(ConfigError, match="max_norm=0.*above 0"):
        clip_grad_norm_(ours.parameters(), 0)
