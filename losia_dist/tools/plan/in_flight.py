"""What localizing layers hold of their full gradients while a step is under way, beside their averages.

Follows `losia_dist.localization`: one whole gradient is under reduction at a time, and of those before it this GPU's rows are
left. In backward the weights of a decoder layer come in the reverse of their order in the model.
"""

from __future__ import annotations

from losia_dist.tools.plan.workload import Workload

BF16, FP32, INT64 = 2, 4, 8


def in_flight(workload: Workload, passes: int, layers: int, weights: int = 0) -> int:
    """Bytes until the step ends: whole gradients under reduction, this GPU's rows of those before, and of their weights.

    Args:
        passes: micro-batches of the step whose backward is over or under way.
        layers: decoder layers with localizing groups that the latest of them has passed.
        weights: localizing weights of the next one that it has passed too; the gradient of the last of them was just formed.
    """
    localizing = [[weight.elements for weight in layer] for layer in workload.localizing]
    if not passes or not localizing:
        return 0
    sizes = localizing[layers] if weights else localizing[layers - 1]
    weights = min(weights, len(sizes))  # fewer groups of the last such layer may localize than of the others
    passed = sum(map(sum, localizing[:layers])) + sum(sizes[len(sizes) - weights :])
    left = sum(map(sum, localizing)) - passed
    kept = _rows(workload, passed, passes) + _rows(workload, left, passes - 1)
    if _ranks(workload) == 1:
        return kept
    # The transfer before is waited for when the next gradient is there.
    sent = sizes[::-1][max(0, weights - 2) : weights] if weights else sizes[:1] if layers or passes > 1 else []
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
    return workload.sequence_ranks if workload.config.by_rank else workload.cluster.gpus
