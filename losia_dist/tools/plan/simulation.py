"""Peak memory of one GPU, measured: real model class and size, real FSDP2, real LoSiA, one step on fake tensors, sharded over
ranks that are not there.

PyTorch's FSDPMemTracker counts every storage that is alive; nothing is computed. What it cannot see: the driver, NCCL's
buffers, cuBLAS workspaces and fragments of the caching allocator (`Cluster.reserve`). The parts of a LoSiA run that read values
on the host (agreement of ranks, the first step's check) are left out: they keep no memory on the device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from losia_dist.errors import ConfigError
from losia_dist.localization.collectives import RowCollectives
from losia_dist.localization.modes import Localization, make_localization
from losia_dist.localization.slots import SlotGroup, Wanted
from losia_dist.optim.adamw import LoSiAAdamW
from losia_dist.optim.dense_groups import dense_parameter_groups
from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.subnet.groups import losia_parameter_groups
from losia_dist.subnet.shared_inputs import families
from losia_dist.subnet.site import Site
from losia_dist.tools.plan.meta_model import meta_model
from losia_dist.tools.plan.model_shape import decoder_of
from losia_dist.tools.plan.workload import Workload


def simulate(workload: Workload) -> int:
    """One optimizer step, with the optimizer's state in place, and a re-localization, on fake tensors; nothing is sent.

    Returns:
        the peak bytes of one GPU.

    Raises:
        ConfigError: an engine that FSDP2's tracker does not follow, offloading, or a process that is one rank of several.
    """
    apart = workload.offload != "none" or workload.activation_offload or workload.chunked_loss
    if workload.engine not in ("fsdp2", "hsdp") or apart:
        raise ConfigError(
            f"--simulate follows fsdp2 and hsdp without offload, with the plain loss; --engine {workload.engine} --offload "
            f"{workload.offload} is planned by formulas alone: leave out --simulate, or give --engine fsdp2."
        )
    with warnings.catch_warnings(), _fake_ranks(workload.cluster.gpus):
        warnings.simplefilter("ignore")
        model, mode = _sharded_model(workload), FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model.to_empty(device="cpu")
            localization, localizing = _localizing(model, workload) if workload.method == "losia" else (None, [])
            groups = losia_parameter_groups if workload.method == "losia" else dense_parameter_groups
            optimizer = LoSiAAdamW(groups(model, lr=1e-4))
            optimizer.create_state()
            for state in optimizer.state.values():
                state["step"] = numpy.float64(0)  # read on the host at every step, which a fake tensor cannot be
            tokens = torch.zeros(workload.micro_batch, workload.sequence, dtype=torch.int64)
            tracker = FSDPMemTracker(model, optimizer)
            sinks: list[Any] = [site.gradient_sink for site in localizing]
            tracker.track_inputs((tokens, *(part for sink in sinks for part in (sink.mean, sink.deviation))))
            del sinks
            with tracker:
                for _ in range(workload.accumulation):
                    tracker.reset_mod_stats()
                    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                    loss.backward()
                    del loss
                optimizer.step()
                for site in localizing:
                    # Lets go of what `end_step` lets go of; its arithmetic, in bands, never is the fullest moment.
                    site.gradient_sink.discard_step()  # type: ignore[union-attr]
                optimizer.zero_grad(set_to_none=True)
                for family in families(localizing, workload.config.share_columns):
                    _relocalize(localization, family)
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return int(snapshot["Total"])


@contextlib.contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of `world_size` ranks of a process group whose collectives do nothing."""
    if dist.is_initialized():
        raise ConfigError("a simulation needs a process of its own: run losia-dist plan without torchrun or another launcher.")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sharded_model(workload: Workload) -> Any:
    """The model on the meta device, with the method's layers, sharded as the training script does. Outside the fake mode."""
    model = meta_model(workload)
    if workload.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gpus, shards, policy = workload.cluster.gpus, workload.shards, MixedPrecisionPolicy(reduce_dtype=torch.float32)
    mesh: DeviceMesh
    if workload.engine == "hsdp":
        mesh = init_device_mesh("cpu", (gpus // shards, shards), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (gpus,), mesh_dim_names=("shard",))
    for module in [*decoder_of(model).layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    return model


def _localizing(model: nn.Module, workload: Workload) -> tuple[Localization, list[Site]]:
    """The layers whose backward comes first localize: their gradients stay while all others are computed, the worst place."""
    sites = find_sites(model)
    names = group_names([site for site in sites if not site.is_output])[::-1][: workload.localizing_groups]
    localization = make_localization(workload.config, RowCollectives(dist.group.WORLD), weight_is_resident=False)
    localizing = [site for site in sites if site.group_name in names]
    for site in localizing:
        place = SlotGroup(site.group_name, 0)  # with reduction="by_rank" rank 0, which this is, works at its own groups
        site.gradient_sink = localization.accumulator(place, site)
    return localization, localizing


def _relocalize(localization: Any, family: list[Site]) -> None:
    """The end of a slot: choose the subnet of a layer, or of layers that share columns, and let go of their averages."""
    accumulators = [site.gradient_sink for site in family]
    for site in family:
        site.gradient_sink = None
    wanted = [Wanted(site.matrix_names, 1, site.shape, (site.row_index, site.col_index)) for site in family]
    localization.choose(SlotGroup(family[0].group_name, 0), accumulators, wanted)
