"""Bytes that one GPU sends in an optimizer step, inside its node and between nodes (rings, as NCCL makes them)."""

from __future__ import annotations

from dataclasses import dataclass

from losia_dist.formulas import ring_bytes
from losia_dist.planning.memory import BF16, FP32, sizes
from losia_dist.planning.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes a GPU sends in one optimizer step: gathering weights, reducing gradients, reducing the localizing layers' full
    gradients. between_nodes: the part of all that which crosses to another node, for each GPU; seconds on the cluster's links.
    """

    weights: int
    gradients: int
    localization: int
    between_nodes: int
    seconds: float

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.localization


def plan_traffic(workload: Workload) -> Traffic:
    """Every collective of a step but selection's row and column sums, which are 8 (2 m + 2 n) bytes a layer once a slot."""
    found, engine, cluster = sizes(workload), workload.engine, workload.cluster
    layers, passes, gpus, shards = workload.shape.layers, workload.accumulation, cluster.gpus, workload.shards
    trained = found.all_trained(layers)
    whole = BF16 * (layers * (found.layer_weights + found.layer_added) + found.outer_weights + found.outer_added)
    inside: dict[str, int] = {"weights": 0, "gradients": 0, "localization": 0}
    between = 0

    def ring(part: str, size: int, ranks: int, times: int = 1) -> None:
        nonlocal between
        sent = times * ring_bytes(size, ranks)
        inside[part] += sent
        if ranks > cluster.gpus_per_node:  # one ring through all nodes; the links of a node share what leaves it
            between += sent // cluster.gpus_per_node

    if workload.shards_weights:
        ring("weights", whole, shards, 2 * passes)  # before forward and before backward
        ring("gradients", (BF16 if engine == "zero3" else FP32) * trained, shards, passes)
        if engine == "hsdp":
            replicas = gpus // shards
            sent = passes * 2 * ring_bytes(FP32 * trained // shards, replicas)
            inside["gradients"] += sent
            between += sent if shards >= cluster.gpus_per_node else sent // max(1, cluster.gpus_per_node // shards)
    elif engine == "ddp":
        ring("gradients", BF16 * trained, gpus, 2)
    else:
        ring("gradients", BF16 * trained, gpus, passes if engine == "zero2" else 1)
        ring("weights", BF16 * trained, gpus)  # the updated values
    if not workload.config.by_rank:
        ring("localization", BF16 * found.localizing, gpus, passes)
    between = between if cluster.nodes > 1 else 0
    seconds = max(sum(inside.values()) / cluster.gpu_bandwidth, between / cluster.node_bandwidth) / cluster.link_efficiency
    return Traffic(**inside, between_nodes=between, seconds=seconds)
