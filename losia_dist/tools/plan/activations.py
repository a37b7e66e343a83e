"""Bytes of activations, by what autograd keeps of a bf16 decoder layer of Transformers (Llama, Mistral, Qwen2, Qwen3; SDPA).

A layer of any other kind is measured instead (`tools.plan.measured`), once for each way it is used.

Dimensions: t tokens of one forward pass, H hidden, I intermediate, A and K elements of all query and key-value heads, V
vocabulary. Norms compute in fp32 (4 bytes), everything else is bf16 (2 bytes).
"""

from __future__ import annotations

from typing import Any

from losia_dist.formulas import subnet_size
from losia_dist.loss.chunked import CHUNK_LOGITS
from losia_dist.tools.plan.model_shape import FAMILIES
from losia_dist.tools.plan.workload import Workload


def checkpoint_bytes(workload: Workload) -> int:
    """What stays of a decoder layer whose inside is recomputed: its input, 2 t H."""
    return 2 * workload.tokens * workload.shape.hidden


def shared_bytes(workload: Workload) -> int:
    """What all layers share: the attention mask (1 byte a pair of positions), cosines and sines of the positions."""
    shape = workload.shape
    if (measured := _measured(workload)) is not None:
        return int(measured.shared)
    if workload.sequence_ranks > 1:  # no mask: no token sees what comes after it
        return 4 * workload.tokens * shape.head_size
    return workload.micro_batch * (workload.sequence**2 + 4 * workload.sequence * shape.head_size)


def saved_bytes(workload: Workload, localizing: bool = False) -> int:
    """What backward of one decoder layer reads, apart from weights.

    Both norms keep their fp32 input; attention q, k, v (repeated to all heads, as the mask demands) and its output; the MLP
    both branches, the activation and, where its weights train, the product. A linear layer keeps its input if it trains in
    full or localizes (also LoRA, for its first matrix), and only the subnet's columns under LoSiA.
    """
    if (measured := _measured(workload, localizing)) is not None:
        return int(measured.saved)
    shape, tokens = workload.shape, workload.tokens
    hidden, inner, attended = shape.hidden, shape.intermediate, shape.attended
    keys = shape.kv_heads * shape.head_size
    # Per token: norms; q, k, v and the output of attention; its log-sum-exp; gate, activation and up.
    size = 8 * hidden + 8 * attended + 4 * shape.heads + 6 * inner
    if shape.family == "qwen3":
        size += 4 * (attended + keys)  # norms of q and k, in fp32
    inputs = 4 * hidden + 2 * inner  # of q, k, v; of gate and up; of down. That of o is attention's output, counted above
    if workload.method == "full":
        size += inputs + 4 * hidden + (2 * (attended + keys) if shape.family == "qwen3" else 0)  # norms' weights train too
    elif workload.method == "lora":
        size += inputs + 2 * workload.lora_rank * len(shape.linears())
    elif localizing:
        size += inputs
    else:
        size += 2 * sum(subnet_size(n, workload.config.column_factor) for _, n in shape.linears().values())
    return size * tokens


def moments_of_backward(workload: Workload, localizing: bool) -> dict[str, tuple[int, int]]:
    """Full moments of one layer's backward: full gradients formed by then, and bytes beyond what was saved, without those.

    A localizing layer has one where each full gradient is formed while the one before is still being reduced.
    """
    if (measured := _measured(workload, localizing)) is not None:
        formed = {f"gradient {at}": (at, size) for at, size in enumerate(measured.at_gradients, start=1)}
        return {"backward": (0, measured.beyond), **formed}
    moments = {"backward": (int(localizing), backward_bytes(workload, localizing))}
    if localizing:
        moments["gradients"] = (2, second_gradient_bytes(workload))
    return moments


def _measured(workload: Workload, localizing: bool = False) -> Any:
    """A `Measured` of a layer for which there are no formulas, else None."""
    shape: Any = workload.shape
    if shape.family in FAMILIES:
        return None
    from losia_dist.tools.plan.measured import measure

    key = (workload.method, workload.micro_batch, workload.sequence, workload.lora_rank, repr(workload.config), localizing)
    if key not in shape.measured:
        shape.measured[key] = measure(workload, localizing)
    return shape.measured[key]


def backward_bytes(workload: Workload, localizing: bool = False) -> int:
    """What the fullest moment of a layer's backward takes beyond what was saved.

    Gradients of the layer's output, of the product of both MLP branches and of each of its factors; what the last linear
    layer had saved of the product has been let go by then.
    """
    shape = workload.shape
    whole = workload.method in ("full", "lora") or localizing
    product = shape.intermediate if whole else subnet_size(shape.intermediate, workload.config.column_factor)
    # Where ranks exchange heads for tokens: one tensor as it came, as it was sent and as it arrived.
    exchanged = 6 * shape.attended * workload.tokens if workload.sequence_ranks > 1 else 0
    return exchanged + workload.tokens * (2 * shape.hidden + 6 * shape.intermediate - 2 * product)


def second_gradient_bytes(workload: Workload) -> int:
    """What backward of a localizing layer takes beyond what was saved, when its second full gradient (`up_proj`'s) is there.

    Gradients of the layer's output, of both branches and of the input; both branches and the product have been let go.
    """
    return 4 * workload.tokens * (workload.shape.hidden - workload.shape.intermediate // 2)


def head_bytes(workload: Workload) -> int:
    """What the last norm and the output layer keep: 4 t H, and 2 t H for the weight's gradient or columns."""
    return 6 * workload.tokens * workload.shape.hidden


def logits_bytes(workload: Workload) -> int:
    """Logits in the loss's backward: fp32 log-probabilities, their gradient and the logits' gradient, 12 t V. A chunked loss
    has those of a chunk, and the gradient of what enters the output layer."""
    shape = workload.shape
    if not workload.chunked_loss:
        return 12 * workload.tokens * shape.vocabulary
    chunk = min(workload.tokens, max(64, CHUNK_LOGITS // shape.vocabulary))
    return 12 * chunk * shape.vocabulary + 2 * workload.tokens * shape.hidden
