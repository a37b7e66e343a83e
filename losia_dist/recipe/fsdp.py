"""FSDP2 and HSDP for the training script: the mesh, and `fully_shard` on every decoder layer and the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losia_dist.errors import ConfigError
from losia_dist.ranks.agreement import Agreement
from losia_dist.recipe.cpu_gather import InPlaceAllGather
from losia_dist.recipe.environment import Process
from losia_dist.recipe.weights.empty import Holders, Where, find_holders, give_memory
from losia_dist.recipe.weights.streamed import StreamedWeights
from losia_dist.sharding.fully_shard import own_range

_GRAMMAR = re.compile(r"(fsdp2|hsdp)(-no-reshard)?(?::(\d+))?")


@dataclass(frozen=True)
class Sharding:
    """Which ranks share one copy of the model, and whether weights are let go between forward and backward.

    ranks: that share a copy (HSDP: usually those of a node); None: all of them.
    """

    ranks: int | None
    reshard: bool

    @classmethod
    def parse(cls, text: str) -> Sharding:
        """Read "fsdp2", "fsdp2-no-reshard", "hsdp:8" or "hsdp-no-reshard:8". Raises: ConfigError for anything else."""
        match = _GRAMMAR.fullmatch(text)
        if match is None or (match[1] == "hsdp") != (match[3] is not None):
            raise ConfigError(
                f"--sharding {text}: give fsdp2, fsdp2-no-reshard, or hsdp:N (or hsdp-no-reshard:N), N being the number of "
                "ranks that share one copy of the model, usually the GPUs of a node."
            )
        return cls(int(match[3]) if match[3] else None, match[2] is None)

    def check(self, world_size: int) -> None:
        """Raises: ConfigError where these ranks cannot form the mesh."""
        if world_size == 1:
            raise ConfigError(
                "--sharding needs at least two ranks, and this process runs alone: start it with torchrun or accelerate "
                "launch, or leave --sharding out."
            )
        if self.ranks is not None and not (1 < self.ranks < world_size and world_size % self.ranks == 0):
            raise ConfigError(
                f"--sharding hsdp:{self.ranks} with {world_size} ranks: N must be at least 2, less than the number of ranks, "
                "and divide it. With all ranks sharing one copy, use fsdp2."
            )


def shard(
    model: Any,
    sharding: Sharding,
    process: Process,
    *,
    precision: str,
    offload: bool,
    layer_classes: tuple[str, ...] = (),
    weights: StreamedWeights | None,
    agreement: Agreement,
) -> Any:
    """`fully_shard` a model in place, unit by unit; returns it. Called by all ranks.

    Args:
        weights: every rank reads its own part from here, and the model is on the meta device. None: rank 0's values, whole
            units of which are on every rank's device one at a time; on the other ranks the model may be on the meta device.
        agreement: of the ranks, which stop together if one cannot read its part.
        precision: "bf16": gradients are reduced in fp32.
        offload: shards, gradients and optimizer state stay on the CPU.
        layer_classes: class names of the units, which may lie within each other; empty: the model's decoder layers.

    Raises:
        ConfigError: the model has no such layers, two of them share a weight, or a file cannot be read (on every rank).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if sharding.ranks is None:
        mesh = init_device_mesh(process.device.type, (process.world_size,), mesh_dim_names=("shard",))
    else:
        shape = (process.world_size // sharding.ranks, sharding.ranks)
        mesh = init_device_mesh(process.device.type, shape, mesh_dim_names=("replicate", "shard"))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": sharding.reshard}
    if precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=process.device.type == "cuda")
    holders = find_holders(model)
    for unit in [*_layers(model, layer_classes), model]:
        if weights is None:
            list(give_memory(unit, process.device, holders, fill=take_from_rank_0))
        fully_shard(unit, **options)
        if process.device.type == "cpu":
            unit.set_custom_all_gather(InPlaceAllGather())
    if weights is not None:
        places = _give_shards_memory(model, process.device, torch.device("cpu") if offload else process.device, holders)
        agreement.attempt(None, lambda: weights.fill(places, own_range))
    return model


def _layers(model: Any, layer_classes: tuple[str, ...]) -> list[nn.Module]:
    names = layer_classes or tuple(getattr(model, "_no_split_modules", None) or ())
    found = [(name.count("."), module) for name, module in model.named_modules() if type(module).__name__ in names]
    layers = [module for _, module in sorted(found, key=lambda one: -one[0])]  # a unit inside another one comes first
    if not layers:
        classes = sorted({type(module).__name__ for module in model.modules() if list(module.children())})
        raise ConfigError(
            f"--sharding: {type(model).__name__} has no layers of the class {' or '.join(names) or '(it names none)'}, so it "
            f"would be gathered whole. Its modules: {', '.join(classes)}. Name the decoder layer's class with --shard_layers."
        )
    if layer_classes:
        _refuse_shared(model, layers)
    return layers


def _refuse_shared(model: Any, units: list[nn.Module]) -> None:
    """Raises: ConfigError where modules of two units hold one parameter: each unit would shard a copy of its own.

    units: inner ones before those they lie in.
    """
    unit_of: dict[int, int] = {}
    for place, unit in enumerate(units):
        for module in unit.modules():
            unit_of.setdefault(id(module), place)
    first: dict[int, tuple[str, int]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            here = (f"{name}.{kind}".lstrip("."), unit_of.get(id(module), -1))
            other = first.setdefault(id(parameter), here)
            if other[1] != here[1]:
                raise ConfigError(
                    f"--shard_layers: {other[0]} and {here[0]} share one weight, and would be sharded apart. Name no class "
                    "that parts them, so that both stay with the rest of the model."
                )


@torch.no_grad()
def _give_shards_memory(model: nn.Module, device: torch.device, shard_device: torch.device, holders: Holders) -> list[Where]:
    """Move a sharded model off the meta device, each rank its own shards, with arbitrary values.

    holders: where the model kept its tensors before it was sharded.
    """
    # As to_empty does it, which would drop the values of buffers. A DTensor changes in place: what is shared stays shared.
    model._apply(
        lambda tensor: (
            torch.empty_like(tensor, device=shard_device if isinstance(tensor, DTensor) else device)
            if tensor.is_meta
            else tensor.to(device)
        )
    )
    return [Where(old, *places[0]) for old, places in holders.items()]


def take_from_rank_0(values: Tensor) -> None:
    """Replace values by those of rank 0. Called by all ranks."""
    dist.broadcast(values, src=0)
