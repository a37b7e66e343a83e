"""Bytes of one GPU at the fullest moment of a step, by what they are for.

What stays all the time is added to each moment of a step in turn (forward, loss, backward of every layer, update), and the
fullest moment counts. FSDP2's moments follow torch's implementation, and are held against simulations; DeepSpeed's follow the
buffers that version 0.19.8 allocates under the files in configs/deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from losia_dist.formulas import subnet_size
from losia_dist.loss.chunked import CHUNK_LOGITS
from losia_dist.tools.plan.in_flight import BF16, FP32, INT64, in_flight
from losia_dist.tools.plan.measured import layer_activations
from losia_dist.tools.plan.model_shape import Layer
from losia_dist.tools.plan.quantized import dense_bytes, gathered_overlay_bytes, overlay_bytes, saved_elements, scale_bytes
from losia_dist.tools.plan.workload import Workload

# DeepSpeed's defaults, in elements: gradients reduced at once, and weights that stage 3 keeps gathered.
REDUCE_BUCKET, MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000

PARTS = {
    "weights": "weights that this GPU keeps",
    "subnet": "subnets (LoSiA) or adapters (LoRA), and their indices",
    "overlay": "what subnets leave beside the codes of a quantized base, in one cycle",
    "gradients": "gradients of what trains, and buffers they are reduced in",
    "masters": "fp32 master values",
    "moments": "AdamW's two moments",
    "importance": "averages of the localizing layers, and their full gradients on the way",
    "activations": "activations, saved and in use",
    "gathered": "whole layers gathered from shards",
    "logits": "logits and their gradients in the loss",
    "update": "temporaries of the optimizer's update",
    "reserve": "driver, NCCL, fragments of the allocator",
}


@dataclass(frozen=True)
class Memory:
    """parts: bytes by the names of PARTS, at the fullest moment. moment: which one that is. host: bytes in host memory."""

    parts: dict[str, int]
    moment: str
    host: int = 0

    @property
    def peak(self) -> int:
        """Everything but the reserve: what a tracker of tensors sees."""
        return self.total - self.parts["reserve"]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class _Sizes:
    """Elements, in codes as many of bf16 as take their room. layer_*: of the fullest decoder layer; outer_*: outside of them.
    added: subnets or adapters beside the weights. lacking_*: what the other layers hold less than the fullest, in all.
    """

    layer_weights: int
    outer_weights: int
    layer_added: int
    outer_added: int
    layer_trained: int
    outer_trained: int
    indices: int = 0
    localizing: int = 0  # elements of the weights that one rank works at in a slot
    lacking_weights: int = 0
    lacking_trained: int = 0

    def all_trained(self, layers: int) -> int:
        return layers * self.layer_trained - self.lacking_trained + self.outer_trained

    def all_added(self, layers: int) -> int:
        return self.outer_added + (layers * self.layer_added - self.lacking_trained if self.layer_added else 0)

    def all_weights(self, layers: int) -> int:
        return layers * self.layer_weights - self.lacking_weights + self.outer_weights


def sizes(workload: Workload, padded: bool = False) -> _Sizes:
    """Elements of a workload's model, of what is added to it, and of what trains.

    padded: with what FSDP2 adds to the experts of a weight so that every rank has as many.
    """
    shape, config = workload.shape, workload.config
    block = workload.shards if padded and workload.engine in ("fsdp2", "hsdp") else 1
    kinds = [(count, *_of_layer(workload, layer, block)) for count, layer in shape.kinds]
    _, weights, trained = max(kinds, key=lambda kind: kind[1])
    found = _Sizes(weights, shape.outer_parameters, 0, 0, trained, shape.outer_parameters)
    found.lacking_weights = sum(count * (weights - other) for count, other, _ in kinds)
    found.lacking_trained = sum(count * (trained - other) for count, _, other in kinds)
    if workload.method != "full":
        found.layer_added, found.outer_trained = trained, 0
    if workload.method == "losia":
        places = [(count * w.experts, w) for count, layer in shape.kinds for w in layer.weights]
        found.indices = sum(count * sum(workload.subnet(w.m, w.n)) for count, w in places)
        if config.output_rank_factor is not None:
            rows = subnet_size(shape.vocabulary, config.output_rank_factor)
            found.outer_added = found.outer_trained = rows * shape.hidden
            found.indices += rows + shape.hidden
        found.localizing = sum(weight.elements for layer in workload.localizing for weight in layer)
    return found


def _of_layer(workload: Workload, layer: Layer, block: int) -> tuple[int, int]:
    """Elements of a decoder layer, and of what trains in it, each weight's experts padded to a multiple of `block`."""

    def padded(count: int) -> int:
        return -(-count // block) * block if count > 1 else count

    weights = layer.parameters
    if workload.quantization is None:
        weights += sum((padded(w.experts) - w.experts) * w.m * w.n for w in layer.weights)
    else:  # codes of all experts are one vector
        weights -= saved_elements(workload, sum(w.elements for w in layer.weights))
    if workload.method == "full":
        return weights, weights
    if workload.method == "lora":
        return weights, sum(padded(w.experts) * workload.lora_rank * (w.m + w.n) for w in layer.weights)
    experts = sum(map(padded, workload.parts_of(layer)))
    return weights, sum((experts if w.experts > 1 else 1) * prod(workload.subnet(w.m, w.n)) for w in layer.weights)


def plan_memory(workload: Workload, cycles: int = 1) -> Memory:
    """The fullest moment of a step on the fullest GPU, and the host memory that offloading takes on every node.

    cycles: after which the step is: what subnets leave beside a quantized base grows with them.
    """
    found = sizes(workload, padded=True)
    steady = _steady(workload, found) | {"overlay": overlay_bytes(workload, cycles)}
    host = 0
    if workload.offload != "none":
        moved = ["masters", "moments"] + (["weights", "subnet"] if workload.offload == "all" else [])
        host = sum(steady[name] for name in moved) * workload.cluster.gpus_per_node
        steady |= dict.fromkeys(moved, 0)
    if workload.activation_offload:
        host += workload.shape.layers * checkpoint_bytes(workload) * workload.cluster.gpus_per_node
    moments = _sharded_moments(workload, found) if workload.shards_weights else _whole_moments(workload, found)
    moments["update"] = _update(workload, found)
    if workload.method == "losia" and workload.config.located is not None and workload.config.needs_calibration:
        moments["loss, locating first subnets"] = _locating(workload, moments["loss"])
    for name, taken in moments.items():
        if name.startswith(("forward", "backward")):
            taken["activations"] += dense_bytes(workload)
            taken["gathered"] = taken.get("gathered", 0) + gathered_overlay_bytes(workload, cycles)
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory({name: steady.get(name, 0) + moments[fullest].get(name, 0) for name in PARTS}, fullest, host)


def _steady(workload: Workload, found: _Sizes) -> dict[str, int]:
    """What stays between steps."""
    layers, shards, ranks = workload.shape.layers, workload.shards, workload.cluster.gpus
    trained = found.all_trained(layers)
    weights, added = found.all_weights(layers), found.all_added(layers)
    over = shards if workload.shards_weights else 1
    block = workload.sequence_ranks if workload.config.by_rank else ranks
    steady = {
        "weights": BF16 * weights // over + scale_bytes(workload),
        "subnet": BF16 * added // over + INT64 * found.indices,
        "masters": FP32 * trained // shards,
        "moments": 2 * FP32 * trained // shards,
        "importance": 2 * FP32 * found.localizing // block,
        "activations": layer_activations(workload).shared,
        "reserve": workload.cluster.reserve,
    }
    if workload.engine == "zero2":
        steady["gradients"] = 2 * BF16 * REDUCE_BUCKET  # two, so that one is filled while the other is reduced
    elif workload.engine == "zero3":
        steady["gradients"] = BF16 * REDUCE_BUCKET
    return steady


def _locating(workload: Workload, loss: dict[str, int]) -> dict[str, int]:
    """The loss of a calibration batch: every layer keeps what localizing asks for, and no gradient is there yet."""
    layers = workload.shape.layers
    saved = _saved(workload, layers, layers) + _of_head(workload)
    return {**loss, "activations": saved, "importance": 0, "gradients": 0}


def checkpoint_bytes(workload: Workload) -> int:
    """Of one decoder layer: what stays of it where its inside is recomputed."""
    return BF16 * workload.tokens * workload.shape.hidden


def _of_head(workload: Workload) -> int:
    """What the last norm (in fp32) and the output layer keep."""
    return (FP32 + BF16) * workload.tokens * workload.shape.hidden


def _saved(workload: Workload, layers: int, localizing: int) -> int:
    """Saved of `layers` decoder layers whose backward is still to come, `localizing` of them with whole inputs."""
    if workload.checkpointing:
        here = min(2, layers) if workload.activation_offload else layers  # one at work, one on its way
        return here * checkpoint_bytes(workload)
    whole = layer_activations(workload, True).saved if localizing else 0
    return (layers - localizing) * layer_activations(workload).saved + localizing * whole


def _sharded_moments(workload: Workload, found: _Sizes) -> dict[str, dict[str, int]]:
    """Moments of an engine that gathers one layer at a time: the layer at work, the next one, and the outer parameters."""
    layers, shards, passes = workload.shape.layers, workload.shards, workload.accumulation
    unit = BF16 * (found.layer_weights + found.layer_added)
    outer = BF16 * (found.outer_weights + found.outer_added)
    live = BF16 * min(MAX_LIVE_PARAMETERS + found.layer_weights, found.all_weights(layers))
    zero3 = workload.engine == "zero3"
    gathered = {count: live if zero3 else outer + count * unit for count in (1, 2, 3)}
    localizing = len(workload.localizing)
    whole = found.all_trained(layers)
    # With accumulation, of earlier micro-batches: the sums of gradients, and what localizing layers keep.
    before = BF16 * whole // shards if passes > 1 else 0
    earlier = {"gradients": before, "importance": in_flight(workload, passes - 1, localizing)}
    moments = {
        # What was gathered for the layer before is let go when the next layer's weights are copied out of it.
        "forward of layer 1": {
            "gathered": live if zero3 else 2 * (outer + unit),
            "activations": checkpoint_bytes(workload),
            **earlier,
        },
        "forward": {
            "gathered": gathered[3 if layers > 1 else 2],
            "activations": _saved(workload, layers if workload.checkpointing else layers - 1, 0),
            **earlier,
        },
        "loss": {"gathered": gathered[1], **earlier, **_loss(workload)},
    }
    head = BF16 * workload.shape.vocabulary * workload.shape.hidden if workload.method == "full" else found.outer_trained * BF16
    for done in range(layers):  # layers whose backward is over; the one at work comes next
        left = layers - done
        reduced = max(before, BF16 * min(whole, done * found.layer_trained) // shards)
        sending = FP32 * found.layer_trained if done else 0
        waiting = gathered[2 if left > 1 else 1]
        common = {"gathered": waiting, "gradients": reduced + sending + head}
        moments |= {name: {**common, **taken} for name, taken in _backward(workload, done).items()}
        rest = left if workload.checkpointing else left - 1
        moments[f"reduction of layer {left}"] = {
            "gathered": waiting - (0 if zero3 else unit),
            "gradients": reduced + head + (BF16 + FP32) * found.layer_trained + FP32 * found.layer_trained // shards,
            "importance": in_flight(workload, passes, min(done + 1, localizing)),
            "activations": _saved(workload, rest, 0) + checkpoint_bytes(workload),
        }
    moments["reduction outside the layers"] = {
        "gradients": BF16 * whole // shards + (BF16 + FP32) * found.outer_trained + BF16 * found.outer_trained // shards,
        "importance": in_flight(workload, passes, localizing),
    }
    return moments


def _whole_moments(workload: Workload, found: _Sizes) -> dict[str, dict[str, int]]:
    """Moments of an engine whose GPUs keep all weights: loss, and backward of every layer."""
    layers, passes = workload.shape.layers, workload.accumulation
    whole = BF16 * found.all_trained(layers)
    if workload.engine == "ddp" and workload.cluster.gpus > 1:
        whole *= 2  # gradients, and the buckets they are reduced in
    elif workload.engine == "zero2":
        whole //= workload.shards
    before = whole if passes > 1 or workload.engine == "ddp" else 0
    flying = in_flight(workload, passes - 1, len(workload.localizing))
    moments = {"loss": {"gradients": before, "importance": flying, **_loss(workload)}}
    for done in range(layers):
        gradients = max(before, whole * (done + 1) // layers)
        moments |= {name: {"gradients": gradients, **taken} for name, taken in _backward(workload, done).items()}
    return moments


def _loss(workload: Workload) -> dict[str, int]:
    """What the loss's backward finds of activations, on every engine."""
    layers = workload.shape.layers
    saved = _saved(workload, layers, len(workload.localizing))
    logits = _logits(workload)
    return {"activations": saved + _of_head(workload), "logits": logits}


def _logits(workload: Workload) -> int:
    """Log-probabilities, their gradient, the logits' gradient, in fp32. A chunked loss has those of a chunk, and the gradient
    of what enters the output layer."""
    shape = workload.shape
    if not workload.chunked_loss:
        return 3 * FP32 * workload.tokens * shape.vocabulary
    chunk = min(workload.tokens, max(64, CHUNK_LOGITS // shape.vocabulary))
    return 3 * FP32 * chunk * shape.vocabulary + BF16 * workload.tokens * shape.hidden


def _exchanged(workload: Workload) -> int:
    """Where GPUs exchange heads for tokens: one tensor as it came, as it was sent and as it arrived."""
    return 3 * BF16 * workload.shape.attended * workload.tokens if workload.sequence_ranks > 1 else 0


def _backward(workload: Workload, done: int) -> dict[str, dict[str, int]]:
    """Moments of one layer's backward on every engine, after those of `done` layers.

    A localizing layer has one for each number of full gradients that are there.
    """
    left = workload.shape.layers - done
    localizing = len(workload.localizing)
    localizes = done < localizing
    inside = layer_activations(workload, localizes)
    saved = inside.saved + _saved(workload, left if workload.checkpointing else left - 1, max(0, localizing - done - 1))
    return {
        f"backward of layer {left}" + (f", full gradients formed: {formed}" if formed else ""): {
            "importance": in_flight(workload, workload.accumulation, min(done, localizing), formed),
            "activations": saved + beyond + _exchanged(workload),
        }
        for formed, beyond in enumerate(inside.beyond)
    }


def _update(workload: Workload, found: _Sizes) -> dict[str, int]:
    """The optimizer's step: all gradients, and fp32 copies of one parameter group's.

    There is a group for each decoder layer, and one for each module outside of them.
    """
    layers, shards = workload.shape.layers, workload.shards
    trained = found.all_trained(layers)
    table = workload.shape.vocabulary * workload.shape.hidden  # of the embedding, and of the output layer
    group = max(found.layer_trained, min(found.outer_trained, table))
    copies = 2 if workload.engine == "ddp" and workload.cluster.gpus > 1 else 1
    over = 1 if workload.engine in ("ddp", "zero1") else shards
    if workload.offload != "none":
        group = 0  # the update runs on the host
    return {
        "gradients": copies * BF16 * trained // over,
        "importance": in_flight(workload, workload.accumulation, len(workload.localizing)),
        "update": FP32 * group // shards,
    }
