"""Ranks that hold different values are stopped, all of them, with the names of the rank and the layer: at the start, and
where a subnet moves."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.sharding.fully_shard import local_part
from tests.support.models import tiny_llama
from tests.support.quantized import quantize
from tests.support.training import Run, train

CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2}
LAYER = "model.layers.0.self_attn.q_proj"  # of the group that moves at the end of the first slot


def flip_bit(tensor: torch.Tensor, place: tuple[int, int]) -> None:
    tensor.view(torch.int32)[place] ^= 1


def first_local(weight: torch.Tensor, rows: list[int]) -> int:
    """The first of these rows that this rank keeps of a weight, counted in what it keeps."""
    if not hasattr(weight, "device_mesh"):
        return rows[0]
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return next(row - offset[0] for row in rows if offset[0] <= row < offset[0] + shape[0])


def train_with_a_fault(engine: str, culprit: int, where: str) -> None:
    """One bit of one number of a layer flips on one rank, as faulty memory would have it, in the slot's last step."""

    def inspect(stage, losia, _):
        if stage != "before" or losia.steps != 1 or dist.get_rank() != culprit:
            return
        layer = next(layer for layer in losia.sites if layer.name == LAYER)
        if where == "subnet":
            flip_bit(local_part(layer.subnet).data, (0, 0))
            return
        choose, faulty = losia.localization.choose, losia.accumulators[layer]

        def choose_and_fail(group, accumulators, *args):
            choices = choose(group, accumulators, *args)
            for accumulator, choice in zip(accumulators, choices, strict=True):
                if accumulator is faulty:  # a frozen number inside the new subnet, outside the old one
                    new = [row for row in choice.rows.tolist() if row not in layer.row_index.tolist()]
                    flip_bit(local_part(layer.weight).data, (first_local(layer.weight, new), int(choice.columns[0])))
            return choices

        losia.localization.choose = choose_and_fail

    train(engine, Run(steps=2, batch=12, config=CONFIG), inspect)


FAULTS = [("weight", "values read from the weight"), ("subnet", "values left in the weight")]


@pytest.mark.parametrize("where, part", FAULTS)
def test_a_flipped_bit_on_one_of_three_ranks_stops_them_all_and_is_named(ranks, where, part):
    for kind, message in ranks.errors(3, train_with_a_fault, "ddp", 1, where):
        assert kind == "DivergenceError"
        assert f"Differing from the other 2 ranks, rank 1: {part} of {LAYER}." in message
        assert "resume from an earlier checkpoint" in message


def test_a_rank_that_loaded_another_checkpoint_is_stopped_before_the_first_step(ranks):
    for kind, message in ranks.errors(3, start, "none", 2, False):
        assert kind == "DivergenceError"
        assert f"Differing from the other 2 ranks, rank 2: values of {LAYER}" in message
        assert "Start every rank from the same checkpoint" in message


def test_a_rank_with_other_scales_of_a_quantized_base_is_stopped(ranks):
    """DDP sends the codes of rank 0 to all, and each keeps scales of its own: of layers without a subnet too."""
    for kind, message in ranks.errors(3, start_quantized, 2):
        assert kind == "DivergenceError", message
        assert "different scales of the quantized weight of module.model.layers.1.mlp.up_proj (rank 0 and rank 2)" in message
        assert "Load the same files on every rank" in message


def start_quantized(culprit: int) -> None:
    model = tiny_llama(hidden_size=48, intermediate_size=80)
    if dist.get_rank() == culprit:
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    config = LoSiAConfig(rank_factor=0.25, target_modules=["q_proj"])
    model = DistributedDataParallel(get_losia_model(quantize(model, "nf4:double"), config))
    LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2), config)


def test_so_it_is_where_every_rank_keeps_a_part_only(ranks):
    for kind, message in ranks.errors(3, start, "fsdp2", 1, False):
        assert kind == "DivergenceError"
        assert f"the weights of {LAYER} are a mixture" in message
        assert "Load the same checkpoint on every rank" in message


@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp2"])
def test_a_rank_that_was_given_the_first_ranks_weights_is_not(ranks, engine):
    ranks(3, start, engine, 2, True)


def start(engine: str, other: int, shared: bool) -> None:
    """Ranks build and wrap the same model, one of them from another checkpoint; `shared`: they then take rank 0's."""
    model, config = tiny_llama(), LoSiAConfig(**CONFIG)
    if dist.get_rank() == other:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1)
    get_losia_model(model, config)
    if shared and engine != "ddp":  # which does it by itself
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
    if engine == "ddp":
        model = DistributedDataParallel(model)
    elif engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config).detach()


@pytest.mark.slow
@pytest.mark.parametrize("where, part", FAULTS[:2])
def test_a_replica_of_hsdp_is_read_by_itself_and_named_as_a_whole(ranks, where, part):
    for kind, message in ranks.errors(4, train_with_a_fault, "hsdp", 2, where):
        assert kind == "DivergenceError"
        assert f"Differing from ranks 0, 1 (no majority: either may be wrong), ranks 2, 3: {part} of {LAYER}." in message


@pytest.mark.slow
def test_with_two_ranks_both_are_named(ranks):
    for kind, message in ranks.errors(2, train_with_a_fault, "ddp", 0, "weight"):
        assert kind == "DivergenceError"
        assert "Differing from rank 0 (no majority: either may be wrong), rank 1: " in message
