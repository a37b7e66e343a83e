"""What locating all first subnets takes, before the first step (docs/algorithm.md, warm start)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from losia_dist.formulas import ring_bytes
from losia_dist.planning.compute import plan_compute
from losia_dist.planning.traffic import plan_traffic
from losia_dist.planning.workload import Workload

_SUM = 8  # bytes of a float64 sum


def plan_warm_start(workload: Workload) -> dict[str, Any] | None:
    """Passes, bytes and seconds of one GPU, in plain values; None where the first subnets need no calibration batches.

    A pass is forward, recomputation, gradients of activations and of all weights for each calibration batch. Where
    subnets are drawn without outliers, it is one forward pass.
    """
    config, shape = workload.config, workload.shape
    if workload.method != "losia" or not config.needs_calibration:
        return None
    forward_only = config.located is None
    one_sided = forward_only or 1.0 in (config.row_factor, config.column_factor)
    passes = 1 if one_sided else 2
    sides = [(m, n) for m, n in shape.linears().values()]
    if one_sided:
        numbers = shape.layers * sum(n if forward_only or config.row_factor == 1.0 else m for m, n in sides)
    else:
        numbers = shape.layers * sum(m + n for m, n in sides)
    single = replace(workload, accumulation=1)
    compute = plan_compute(single)
    full = 2.0 * workload.tokens * shape.layers * shape.layer_weights
    flops = compute.forward + (0.0 if forward_only else compute.recomputed + compute.inputs + full)
    batches = passes * config.calibration_batches
    peak = workload.cluster.peak_flops * workload.cluster.compute_efficiency
    gathering = plan_traffic(single)
    # Gathers of weights go on as in training; gradients are not communicated.
    transfers = gathering.weights / (workload.cluster.gpu_bandwidth * workload.cluster.link_efficiency)
    return {
        "passes": passes,
        "batches_per_pass": config.calibration_batches,
        "sums_bytes": _SUM * numbers,
        "sent_for_sums_bytes": passes * 2 * ring_bytes(_SUM * numbers, workload.cluster.gpus),
        "largest_gradient_bytes": 0 if forward_only else 2 * max(m * n for m, n in sides),
        "flops": batches * flops,
        "seconds": batches * max(flops / peak, transfers),
    }
