"""What a step and a warm start take of one GPU beside memory: operations, bytes sent, and seconds at stated rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

from losia_dist.formulas import ring_bytes
from losia_dist.tools.plan.memory import BF16, FP32, checkpoint_bytes, sizes
from losia_dist.tools.plan.quantized import overlay_bytes
from losia_dist.tools.plan.workload import Workload

_SUM = 8  # bytes of a float64 sum
HOST_BANDWIDTH = 25e9  # bytes per second and direction between a GPU and its host that are taken to be reached: PCIe 4 x16


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
    gradients; sequence: exchanging heads for tokens where GPUs share sequences. between_nodes: the part of all that which
    crosses to another node, for each GPU. host: activations that wait in host memory, there and back. seconds: on the
    slowest links.
    """

    weights: int
    gradients: int
    localization: int
    between_nodes: int
    seconds: float
    sequence: int = 0
    host: int = 0


def plan_compute(workload: Workload) -> Compute:
    """Matrix products and attention (counted whole: under a mask no half is skipped); everything else is small beside them.

    A unit is 2 operations a weight and token: forward takes one, gradients of activations one, gradients of weights one where
    they train: p_r p_c under LoSiA, and all of the layers that localize, in the steps that take importance. The mean step.
    """
    shape = workload.shape
    tokens = workload.tokens * workload.accumulation
    body = 2.0 * tokens * shape.active_weights
    head = 2.0 * tokens * shape.vocabulary * shape.hidden
    attention = 4.0 * tokens * shape.layers * workload.sequence * shape.attended
    added, trained = _method_products(workload, tokens)
    forward = body + head + attention + added
    recomputed = body + attention + added if workload.checkpointing else 0.0
    inputs = body + head + 2 * attention + added
    trained = body + head if workload.method == "full" else trained
    localizing = workload.importance_share * sum(w.taken * w.m * w.n for layer in workload.localizing for w in layer)
    weights = trained + 2.0 * tokens * localizing * (1 - workload.config.row_factor * workload.config.column_factor)
    total = forward + recomputed + inputs + weights
    return Compute(forward, recomputed, inputs, weights, total, total / _rate(workload))


def _method_products(workload: Workload, tokens: int) -> tuple[float, float]:
    """Operations of LoRA's pairs in a forward pass, and of the gradients of what trains; full fine-tuning's are not counted.

    LoRA in experts forms W + BA whole, and its whole gradient: PEFT's `target_parameters`.
    """
    added = trained = 0.0
    rank = workload.lora_rank
    for count, layer in workload.shape.kinds:
        for m, n, experts, taken, _ in layer.weights:
            if workload.method == "losia":
                trained += 2.0 * tokens * count * taken * prod(workload.subnet(m, n))
            elif workload.method == "lora" and experts == 1:
                added += 2.0 * tokens * count * rank * (m + n)
                trained += 2.0 * tokens * count * rank * (m + n)
            elif workload.method == "lora":
                formed = 2.0 * workload.accumulation * count * experts * rank * m * n
                added += formed
                trained += 2.0 * tokens * count * taken * m * n + formed
    outer = sizes(workload).outer_trained if workload.method == "losia" else 0
    return added, trained + 2.0 * tokens * outer


def plan_traffic(workload: Workload) -> Traffic:
    """Every collective of a step (rings, as NCCL makes them) but selection's row and column sums, which are 8 (2 m + 2 n) bytes
    a layer once a slot."""
    found, engine, cluster = sizes(workload, padded=True), workload.engine, workload.cluster
    layers, passes, gpus, shards = workload.shape.layers, workload.accumulation, cluster.gpus, workload.shards
    trained = found.all_trained(layers)
    whole = BF16 * (found.all_weights(layers) + found.all_added(layers))
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
        left = overlay_bytes(workload) * shards  # whenever a quantized weight is made dense, recomputation included
        ring("weights", left, shards, (3 if workload.checkpointing else 2) * passes)
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
        ring("localization", int(BF16 * found.localizing * workload.importance_share), gpus, passes)
    exchanged = _exchanged(workload)
    sent, far = exchanged * (workload.sequence_ranks - 1), exchanged * max(0, workload.sequence_ranks - cluster.gpus_per_node)
    inside["sequence"], between = sent // workload.sequence_ranks, between + far // workload.sequence_ranks
    between = between if cluster.nodes > 1 else 0
    host = 2 * passes * layers * checkpoint_bytes(workload) if workload.activation_offload else 0
    links = max(sum(inside.values()) / cluster.gpu_bandwidth, between / cluster.node_bandwidth) / cluster.link_efficiency
    return Traffic(**inside, between_nodes=between, seconds=max(links, host / HOST_BANDWIDTH), host=host)


def _exchanged(workload: Workload) -> int:
    """Bytes of queries, keys, values and attention's output that a GPU has in an optimizer step where GPUs share sequences:
    forward, recomputed, and as gradients. Keys of fewer heads than GPUs are sent once for each GPU."""
    if workload.sequence_ranks == 1:
        return 0
    shape = workload.shape
    keys = max(shape.kv_heads, workload.sequence_ranks) * shape.head_size
    ways = 3 if workload.checkpointing else 2
    return ways * BF16 * workload.tokens * workload.accumulation * shape.layers * (2 * shape.attended + 2 * keys)


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
    weights = [(count * w.experts, w.m, w.n) for count, layer in shape.kinds for w in layer.weights]
    sums = _SUM * sum(count * (m * (not columns_alone) + n * (not rows_alone)) for count, m, n in weights)
    single = replace(workload, accumulation=1)
    compute = plan_compute(single)
    full = 2.0 * workload.tokens * shape.active_weights
    flops = compute.forward + (0.0 if forward_only else compute.recomputed + compute.inputs + full)
    batches = passes * config.calibration_batches
    # Gathers of weights go on as in training; gradients are not communicated.
    transfers = plan_traffic(single).weights / (workload.cluster.gpu_bandwidth * workload.cluster.link_efficiency)
    return {
        "passes": passes,
        "batches_per_pass": config.calibration_batches,
        "sums_bytes": sums,
        "sent_for_sums_bytes": passes * 2 * ring_bytes(sums, workload.cluster.gpus),
        "largest_gradient_bytes": 0 if forward_only else 2 * max(m * n for _, m, n in weights),
        "flops": batches * flops,
        "seconds": batches * max(flops / _rate(workload), transfers),
    }


def _rate(workload: Workload) -> float:
    """Operations a second that a GPU is taken to reach."""
    return workload.cluster.peak_flops * workload.cluster.compute_efficiency
