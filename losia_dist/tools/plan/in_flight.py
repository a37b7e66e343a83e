"""What localizing layers hold of their full gradients while a step is under way, beside their averages.

Follows `losia_dist.localization`: one whole gradient is under reduction at a time, and of those before it this GPU's rows are
left. In backward the linear layers of a decoder layer come in the reverse of their order in the model.
"""

from __future__ import annotations

from losia_dist.tools.plan.workload import Workload

BF16, FP32, INT64 = 2, 4, 8


def in_flight(workload: Workload, passes: int, layers: int, linears: int = 0) -> int:
    """Bytes until the step ends: whole gradients under reduction, this GPU's rows of those before, and of their weights.

    Args:
        passes: micro-batches of the step whose backward is over or under way.
        layers: localizing decoder layers that the latest of them has passed.
        linears: linear layers of the next one that it has passed too; the gradient of the last of them was just formed.
    """
    if not passes or not workload.localizing_layers:
        return 0
    weights = [m * n for m, n in workload.shape.linears().values()]
    whole = sum(weights)
    passed = layers * whole + sum(weights[len(weights) - linears :])
    left = min(workload.localizing_layers, workload.shape.layers) * whole - passed
    kept = _rows(workload, passed, passes) + _rows(workload, left, passes - 1)
    if _ranks(workload) == 1:
        return kept
    # The transfer before is waited for when the next gradient is there.
    sent = weights[::-1][max(0, linears - 2) : linears] if linears else weights[:1] if layers or passes > 1 else []
    return kept + BF16 * sum(sent)


def _rows(workload: Workload, elements: int, passes: int) -> int:
    """The rows of the first pass are kept as they came, and from the third on the sum is in fp32."""
    if not passes:
        return 0
    size = BF16 * (2 if workload.shards_weights else 1)
    if passes > 1:
        size += FP32 if passes > 2 else BF16
    return size * elements // _ranks(workload)


def _ranks(workload: Workload) -> int:
    return 1 if workload.config.by_rank else workload.cluster.gpus
