"""Experts as modules of their own: ranks whose tokens reach different experts train as one process with all tokens does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups
from losia_dist.errors import UnsupportedError
from losia_dist.subnet.convert import find_sites
from tests.support.training import unwrap

CONFIG = LoSiAConfig(rank_factor=0.25, period=2, selection=Drawn())


class Block(nn.Module):
    """A router of one choice, and experts in a list; as code of a model's own has them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        flat = x.reshape(-1, 16)
        weights, chosen = self.gate(flat).softmax(-1).max(-1)
        y = torch.zeros_like(flat)
        for place, expert in enumerate(self.experts):
            mine = (chosen == place).nonzero().squeeze(1)
            if mine.numel():
                y = y.index_add(0, mine, expert(flat[mine]) * weights[mine, None])
        return x + y.view_as(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def data():
    """Each rank's rows: those of rank 0 all alike, so that they reach one expert a layer."""
    torch.manual_seed(3)
    rows = torch.randn(8, 4, 5, 16)
    rows[:, :2] = rows[:, :1, :1]
    return rows


def train(engine: str, config: LoSiAConfig = CONFIG):
    torch.manual_seed(0)
    model = get_losia_model(Model(), config).train()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if engine.startswith("zero"):
        if engine == "zero3-leaf":
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(model, [Block])
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(engine[4])},
        }
        model, optimizer, _, _ = initialize(model=model, losia_config=config, config=settings, optimizer=optimizer)
        losia = model.losia
    else:
        if engine == "ddp":
            model = DistributedDataParallel(model)
        if engine == "fsdp2":
            for layer in [*model.layers, model]:
                fully_shard(layer)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
        losia = LoSiA(model, optimizer, config)
    for rows in data():
        loss = model(rows.chunk(world)[rank]).square().mean()
        if engine.startswith("zero"):
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            losia.step()
            optimizer.zero_grad()
    losia.consolidate()
    return {site.name: losia.parameters.read_whole(site.weight).clone() for site in find_sites(unwrap(losia.model))}


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero3-leaf", "fsdp2"])
def test_ranks_with_tokens_for_different_experts_train_as_one_process(ranks, engine):
    expected = train("one")
    assert len(expected) == 7  # first, and three experts in two layers; no router
    for found in ranks(2, train, engine):
        worst = max((found[name] - weight).abs().max().item() for name, weight in expected.items())
        assert worst < 1e-5, worst


def refusal(engine: str, config: LoSiAConfig) -> str:
    with pytest.raises(UnsupportedError) as caught:
        train(engine, config)
    return str(caught.value)


@pytest.mark.parametrize(
    "engine, config, fix",
    [
        ("ddp", LoSiAConfig(rank_factor=0.25), "Draw subnets"),
        ("zero2", CONFIG, "reduces gradients in the order in which they come"),
        ("zero3", CONFIG, "set_z3_leaf_modules(model, [Block])"),
    ],
)
def test_where_ranks_would_wait_for_each_other_is_refused(ranks, engine, config, fix):
    assert all(fix in message for message in ranks(2, refusal, engine, config))
