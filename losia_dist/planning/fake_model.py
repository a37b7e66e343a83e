"""A model of real class and size on fake tensors, sharded over ranks that are not there: what `simulation` runs.

Memory is what the real objects would take; nothing is computed. The parts of a LoSiA run that read values on the host
(agreement of ranks, the first step's check) are left out: they keep no memory on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from losia_dist.errors import ConfigError
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.modes import Localization, make_localization
from losia_dist.localization.slots import SlotGroup, Wanted
from losia_dist.model import get_losia_model
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.optim.dense_groups import dense_parameter_groups
from losia_dist.planning.workload import Workload
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.subnet.groups import losia_parameter_groups
from losia_dist.subnet.kinds import whole_shape
from losia_dist.subnet.site import Site


@dataclass
class FakeRun:
    """A sharded model and its optimizer on fake tensors. localizing: the layers that accumulate importance."""

    model: Any
    optimizer: LoSiAAdamW
    localization: Localization | None
    localizing: list[Site]

    def step(self, tokens: Tensor, accumulation: int, before_each: Callable[[], None]) -> None:
        """One optimizer step over equal micro-batches, as the training loop makes it. `before_each` micro-batch is called."""
        for _ in range(accumulation):
            before_each()
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            del loss
        self.optimizer.step()
        for site in self.localizing:
            assert site.gradient_sink is not None
            # Lets go of what `end_step` lets go of; its arithmetic, in bands, never is the fullest moment.
            site.gradient_sink.discard_step()  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none=True)

    def relocalize(self) -> None:
        """The end of a slot: choose the subnets of the layers that localized."""
        for site in self.localizing:
            accumulator, site.gradient_sink = site.gradient_sink, None
            assert self.localization is not None
            shape = site.shape
            wanted = Wanted(site.name, 1, shape, (site.row_index, site.col_index))
            self.localization.choose(SlotGroup(site.group_name, 0), accumulator, wanted)  # type: ignore[arg-type]
            del accumulator


@contextlib.contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` ranks of a process group whose collectives do nothing.

    Raises:
        ConfigError: this process belongs to a real group already.
    """
    if dist.is_initialized():
        raise ConfigError("a simulation needs a process of its own: run losia-dist plan without torchrun or another launcher.")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_mesh(workload: Workload) -> DeviceMesh:
    """The ranks as FSDP2 or HSDP sees them. Made outside the fake mode."""
    gpus, shards = workload.cluster.gpus, workload.shards
    if workload.engine == "hsdp":
        return init_device_mesh("cpu", (gpus // shards, shards), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (gpus,), mesh_dim_names=("shard",))


def make_run(workload: Workload, mesh: DeviceMesh, mode: FakeTensorMode) -> FakeRun:
    """Model, method, sharding and optimizer as the training script puts them together."""
    model = _meta_model(workload)
    if workload.method == "losia":
        get_losia_model(model, workload.config)
    elif workload.method == "lora":
        add_low_rank(model, workload.lora_rank)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for site in [*model.model.layers, model]:
        fully_shard(site, **options)
    with mode:
        model.to_empty(device="cpu")
        run = _with_losia(model, workload) if workload.method == "losia" else _with_adamw(model)
        run.optimizer.create_state()
        for state in run.optimizer.state.values():
            state["step"] = numpy.float64(0)  # read on the host at every step, which a fake tensor cannot be
    return run


def _meta_model(workload: Workload) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            workload.shape.configuration(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.tie_weights()
    model.train()
    if workload.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _with_adamw(model: nn.Module) -> FakeRun:
    return FakeRun(model, LoSiAAdamW(dense_parameter_groups(model, lr=1e-4)), None, [])


def _with_losia(model: nn.Module, workload: Workload) -> FakeRun:
    """The layers whose backward comes first localize: their gradients stay while all others are computed, the worst place."""
    sites, access, config = find_sites(model), resolve_parameters(model), workload.config
    names = group_names([site for site in sites if not site.is_output])[::-1][: workload.localizing_layers]
    localization = make_localization(config, RowCollectives(dist.group.WORLD), weight_is_resident=False)
    localizing = [site for site in sites if site.group_name in names]
    for site in localizing:
        place = SlotGroup(site.group_name, 0)  # with reduction="by_rank" rank 0, which this is, works at its own groups
        site.gradient_sink = localization.accumulator(place, whole_shape(access, site), torch.device("cpu"))
    return FakeRun(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-4)), localization, localizing)


class LowRankLinear(nn.Module):
    """y = x W^T + x A^T B^T with W frozen: LoRA (Hu et al., arXiv 2106.09685), to compare with. A [r, n], B [m, r]."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        like: dict[str, Any] = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, rank, **like)
        self.up = nn.Linear(rank, base.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_low_rank(model: Any, rank: int) -> None:
    """Freeze a model and give every linear layer of its decoder a LoRA pair, in place."""
    model.requires_grad_(False)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), child, LowRankLinear(module, rank))
