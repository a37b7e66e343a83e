"""What a step and a warm start take of one GPU beside memory: operations, bytes sent, and seconds at stated rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from losia_dist.formulas import ring_bytes
from losia_dist.tools.plan.memory import BF16, FP32, sizes
from losia_dist.tools.plan.workload import Workload

_SUM = 8  # bytes of a float64 sum


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of one GPU in one optimizer step: multiply-adds count as two. seconds: at the stated share of
    the peak rate."""

    forward: float
    recomputed: float
    inputs: float  # gradients of activations
    weights: float  # gradients of what trains, and full gradients of the localizing layers
    total: float
    seconds: float


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


def plan_compute(workload: Workload) -> Compute:
    """Matrix products and attention (counted whole: under a mask no half is skipped); everything else is small beside them.

    A unit is 2 operations a weight and token: forward takes one, gradients of activations one, gradients of weights one where
    they train: p_r p_c under LoSiA, and all of the layers that localize.
    """
    shape, found = workload.shape, sizes(workload)
    tokens = workload.tokens * workload.accumulation
    body = 2.0 * tokens * shape.layers * shape.layer_weights
    head = 2.0 * tokens * shape.vocabulary * shape.hidden
    attention = 4.0 * tokens * shape.layers * workload.sequence * shape.attended
    added = 2.0 * tokens * shape.layers * found.layer_added if workload.method == "lora" else 0.0
    forward = body + head + attention + added
    recomputed = body + attention + added if workload.checkpointing else 0.0
    inputs = body + head + 2 * attention + added
    trained = 2.0 * tokens * found.all_trained(shape.layers) if workload.method != "full" else body + head
    weights = trained + 2.0 * tokens * found.localizing * (1 - workload.config.row_factor * workload.config.column_factor)
    total = forward + recomputed + inputs + weights
    return Compute(forward, recomputed, inputs, weights, total, total / _rate(workload))


def plan_traffic(workload: Workload) -> Traffic:
    """Every collective of a step (rings, as NCCL makes them) but selection's row and column sums, which are 8 (2 m + 2 n) bytes
    a layer once a slot."""
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


def plan_warm_start(workload: Workload) -> dict[str, Any] | None:
    """Passes, bytes and seconds of one GPU to locate all first subnets, before the first step (docs/algorithm.md, warm start),
    in plain values; None where they need no calibration batches.

    A pass is forward, recomputation, gradients of activations and of all weights for each calibration batch. Where
    subnets are drawn without outliers, it is one forward pass.
    """
    config, shape = workload.config, workload.shape
    if workload.method != "losia" or not config.needs_calibration:
        return None
    forward_only = config.located is None
    columns_alone = forward_only or config.row_factor == 1.0
    rows_alone = config.column_factor == 1.0 and not columns_alone
    passes = 1 if columns_alone or rows_alone else 2
    sides = shape.linears().values()
    sums = _SUM * shape.layers * sum(m * (not columns_alone) + n * (not rows_alone) for m, n in sides)
    single = replace(workload, accumulation=1)
    compute = plan_compute(single)
    full = 2.0 * workload.tokens * shape.layers * shape.layer_weights
    flops = compute.forward + (0.0 if forward_only else compute.recomputed + compute.inputs + full)
    batches = passes * config.calibration_batches
    # Gathers of weights go on as in training; gradients are not communicated.
    transfers = plan_traffic(single).weights / (workload.cluster.gpu_bandwidth * workload.cluster.link_efficiency)
    return {
        "passes": passes,
        "batches_per_pass": config.calibration_batches,
        "sums_bytes": sums,
        "sent_for_sums_bytes": passes * 2 * ring_bytes(sums, workload.cluster.gpus),
        "largest_gradient_bytes": 0 if forward_only else 2 * max(m * n for m, n in sides),
        "flops": batches * flops,
        "seconds": batches * max(flops / _rate(workload), transfers),
    }


def _rate(workload: Workload) -> float:
    """Operations a second that a GPU is taken to reach."""
    return workload.cluster.peak_flops * workload.cluster.compute_efficiency
