"""Floating-point operations of an optimizer step, and the seconds they take at a stated share of the peak rate."""

from __future__ import annotations

from dataclasses import dataclass

from losia_dist.planning.memory import sizes
from losia_dist.planning.workload import Workload


@dataclass(frozen=True)
class Compute:
    """Of one GPU in one optimizer step: multiply-adds count as two operations."""

    forward: float
    recomputed: float
    inputs: float  # gradients of activations
    weights: float  # gradients of what trains, and full gradients of the localizing layers
    seconds: float

    @property
    def total(self) -> float:
        return self.forward + self.recomputed + self.inputs + self.weights


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
    return Compute(
        forward, recomputed, inputs, weights, total / (workload.cluster.peak_flops * workload.cluster.compute_efficiency)
    )
