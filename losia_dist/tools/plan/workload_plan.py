"""One workload's plan: memory, traffic, operations, time, schedule and disk, as one JSON-ready record; and which to choose."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from losia_dist.errors import ConfigError
from losia_dist.formulas import (
    cycle_steps,
    full_checkpoint_bytes,
    importance_checkpoint_bytes,
    journal_bytes,
    layers_per_slot_for,
    step_checkpoint_bytes,
)
from losia_dist.tools.plan.costs import Compute, Traffic, plan_compute, plan_traffic, plan_warm_start
from losia_dist.tools.plan.memory import BF16, Memory, plan_memory, sizes
from losia_dist.tools.plan.overlay_growth import OverlayGrowth, overlay_growth
from losia_dist.tools.plan.workload import Workload

_BY_PREFERENCE = ("fsdp2", "hsdp", "ddp", "zero2", "zero3", "zero1")


@dataclass(frozen=True)
class Plan:
    """What a workload takes. simulated: the simulation's peak bytes, where one was made; it then decides what fits."""

    workload: Workload
    memory: Memory
    traffic: Traffic
    compute: Compute
    simulated: int | None = None

    @property
    def peak(self) -> int:
        return self.memory.peak if self.simulated is None else self.simulated

    @property
    def fits(self) -> bool:
        return self.peak + self.workload.cluster.reserve <= self.workload.cluster.memory

    @property
    def seconds(self) -> float:
        """Of one optimizer step: transfers run beside the computation, so the longer of the two."""
        return max(self.compute.seconds, self.traffic.seconds)

    def overlay_growth(self, steps: int | None) -> OverlayGrowth | None:
        """What subnets leave beside a quantized base in a run of so many steps; None where they leave nothing."""
        return overlay_growth(self.workload, steps, self.peak)

    def record(self, steps: int | None = None) -> dict[str, Any]:
        """Plain values; bytes, seconds and operations are of one GPU and one optimizer step. steps: length of the run."""
        workload, found = self.workload, sizes(self.workload)
        tokens = workload.tokens * workload.accumulation * workload.cluster.gpus
        record: dict[str, Any] = {
            "model": workload.shape.name,
            "parameters": workload.shape.parameters,
            "trained_parameters": found.all_trained(workload.shape.layers),
            "method": workload.method,
            "quantization": workload.quantization,
            "engine": workload.engine,
            "offload": workload.offload,
            "nodes": workload.cluster.nodes,
            "gpus_per_node": workload.cluster.gpus_per_node,
            "sequence_length": workload.sequence,
            "sequence_ranks": workload.sequence_ranks,
            "activation_offload": workload.activation_offload,
            "chunked_loss": workload.chunked_loss,
            "micro_batch": workload.micro_batch,
            "gradient_accumulation": workload.accumulation,
            "checkpointing": workload.checkpointing,
            "peak_bytes_per_gpu": self.peak,
            "planned_peak_bytes_per_gpu": self.memory.peak,
            "simulated_peak_bytes_per_gpu": self.simulated,
            "reserve_bytes": workload.cluster.reserve,
            "gpu_memory_bytes": workload.cluster.memory,
            "fits": self.fits,
            "fullest_moment": self.memory.moment,
            "memory": self.memory.parts,
            "host_bytes_per_node": self.memory.host,
            "traffic_bytes": {name: size for name, size in vars(self.traffic).items() if name != "seconds"},
            "flops": {name: count for name, count in vars(self.compute).items() if name != "seconds"},
            "seconds": {"compute": self.compute.seconds, "transfers": self.traffic.seconds, "step": self.seconds},
            "tokens_per_second": tokens / self.seconds,
            "disk_bytes": _disk(workload),
        }
        if workload.method == "losia":
            record["schedule"] = _schedule(workload, steps)
            growth = self.overlay_growth(steps)
            record["overlay_growth"] = None if growth is None else growth.record()
            record["warm_start"] = plan_warm_start(workload)
        return record


def make_plan(workload: Workload, simulated: int | None = None) -> Plan:
    """The plan of one workload; a fraction of a second for each use of a layer that was not measured before."""
    return Plan(workload, plan_memory(workload), plan_traffic(workload), plan_compute(workload), simulated)


def recommend(workload: Workload) -> Plan | None:
    """The fastest of all engines, with and without checkpointing and offload, that fits; None if none does.

    Micro-batch, sequence, method and cluster stay as they are. Of equally fast ones fsdp2 comes first; offload comes last.
    """
    for offloads in (("none",), ("optimizer", "all")):
        found = []
        for engine, checkpointing, offload in product(_BY_PREFERENCE, (False, True), offloads):
            ranks = workload.shard_ranks if engine == "hsdp" else None
            with contextlib.suppress(ConfigError):  # not an engine for this cluster
                other = replace(workload, engine=engine, checkpointing=checkpointing, offload=offload, shard_ranks=ranks)
                found.append(make_plan(other))
        fitting = [plan for plan in found if plan.fits]
        if fitting:
            return min(fitting, key=lambda plan: plan.seconds)
    return None


def _schedule(workload: Workload, steps: int | None) -> dict[str, Any]:
    config, groups = workload.config, workload.groups
    ranks = workload.data_ranks if config.by_rank else 1
    cycle = cycle_steps(groups, config.period, workload.layers_per_slot * ranks)
    schedule: dict[str, Any] = {
        "groups": groups,
        "period": config.period,
        "selection": "random" if config.located is None else "greedy",
        "layers_per_slot": workload.layers_per_slot,
        "cycle_steps": cycle,
    }
    if steps is not None:
        advised = layers_per_slot_for(steps, groups, config.period, config.cycles)
        schedule |= {
            "steps": steps,
            "cycles": steps / cycle,
            "recommended_layers_per_slot": None if advised is None else -(-advised // ranks),
            "recommended_for_cycles": config.cycles,
        }
    return schedule


def _disk(workload: Workload) -> dict[str, int]:
    found, shape = sizes(workload), workload.shape
    trained = found.all_trained(shape.layers)
    if workload.method == "full":
        return {"step": full_checkpoint_bytes(shape.parameters)}
    if workload.method == "lora":
        return {"step": full_checkpoint_bytes(trained)}
    outer_indices = found.outer_added // shape.hidden + shape.hidden if found.outer_added else 0
    layer_indices = (found.indices - outer_indices) // shape.layers
    return {
        # Of a quantized base its print alone is kept.
        "base_once": BF16 * (shape.parameters if workload.quantization is None else shape.outer_parameters),
        "step": step_checkpoint_bytes(trained, found.indices),
        "importance_inside_a_slot": importance_checkpoint_bytes(found.localizing),
        "journal_per_layer_moved": journal_bytes(found.layer_trained, layer_indices),
    }
