"""A base in fewer bits: bytes of codes and scales, of what subnets leave beside them, and of a layer made dense for a while."""

from __future__ import annotations

from math import prod

from losia_dist.tools.plan.model_shape import Weight
from losia_dist.tools.plan.workload import Workload

# Bytes a value: of codes, which engines cut like any weight, and of scales, which every GPU holds whole. In 4 bits 64 values
# share a scale of a byte, and 256 scales an fp32 number; in FP8 a block of 128 x 128 has one; int8's of rows are counted apart.
_BYTES = {
    "nf4": (0.5, 1 / 64 + 4 / (64 * 256)),
    "fp4": (0.5, 1 / 64 + 4 / (64 * 256)),
    "int8": (1.0, 0.0),
    "fp8": (1.0, 4 / 128**2),
}
_LEFT = {"nf4": 0.5 + 2 / 64, "int8": 1.0, "bf16": 2.0, "fp32": 4.0, "stochastic": 0.0}  # of a value that a subnet left


def saved_elements(workload: Workload, elements: int) -> int:
    """How many bf16 elements fewer the codes of a weight's elements take than its values would."""
    if workload.quantization is None:
        return 0
    return int(elements * (1 - _BYTES[workload.quantization][0] / 2))


def scale_bytes(workload: Workload) -> int:
    """Of all layers, on every GPU."""
    if workload.quantization is None:
        return 0
    rows = 4 if workload.quantization == "int8" else 0
    share = _BYTES[workload.quantization][1]
    weights = [(count * w.experts, w) for count, layer in workload.shape.kinds for w in layer.weights]
    return int(sum(count * (share * w.m * w.n + rows * w.m) for count, w in weights))


def overlay_bytes(workload: Workload, cycles: int = 1) -> int:
    """What all subnets leave in so many cycles, on each GPU: ranks that share the weights share it too.

    Of each weight it grows up to a difference of the whole.
    """
    return sum(count * _left(workload, w, cycles) for count, layer in workload.shape.kinds for w in layer.weights) // (
        workload.shards if workload.shards_weights else 1
    )


def gathered_overlay_bytes(workload: Workload, cycles: int = 1) -> int:
    """Of the weight that has most, with all of its experts: gathered while its layer computes, where ranks share it."""
    if not workload.shards_weights:
        return 0
    return max(_left(workload, w, cycles) for _, layer in workload.shape.kinds for w in layer.weights)


def _left(workload: Workload, weight: Weight, cycles: int) -> int:
    """Bytes that subnets left in one weight, on all ranks together."""
    if workload.quantization is None or workload.method != "losia":
        return 0
    config = workload.config
    form = config.retired or ("int8" if workload.quantization == "fp8" else "nf4")
    return int(_LEFT[form] * weight.experts * min(cycles * prod(workload.subnet(weight.m, weight.n)), weight.m * weight.n))


def dense_bytes(workload: Workload) -> int:
    """The largest weight in bf16, with all of its experts, which is there while its layer computes."""
    if workload.quantization is None:
        return 0
    return 2 * max(w.elements for _, layer in workload.shape.kinds for w in layer.weights)
