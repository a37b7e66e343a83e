"""The loss of a Transformers causal language model without its logits: the model's forward calls its output layer for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.loss.chunked import CHUNK_LOGITS
from losia_dist.loss.head import LossHead
from losia_dist.loss.logits import LogitsRule
from losia_dist.loss.trial import refuse_another_loss

# What a model's forward takes for its output layer and its loss, and its body does not.
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep", "return_dict")


def use_chunked_loss(model: Any, chunk: int | None = None) -> Any:
    """Let a causal language model compute its loss over `chunk` tokens at a time, so that its logits never exist as a whole.

    Changes the model in place and returns it. Called on every rank after `get_losia_model` and before an engine wraps the
    model. From then on `model(..., labels=...)` gives the same loss as before (`num_items_in_batch`, `ignore_index` and
    `shift_labels` included), and logits=None; without labels nothing changes. Costs one more matmul of the output layer a
    step, in backward. Works with an output layer that is frozen, that trains in full or a subnet, or that shares the
    embedding's weight; on every engine, since the output layer still is called once a forward pass; ranks may have different
    lengths. Checkpoints and the exported model do not change.

    On the spot a few made-up logits are put through the model's own loss and this one, which must agree; that needs no
    weights, so that the model may be on the meta device.

    Args:
        chunk: tokens whose logits exist at a time, at least 1. None: as many as make about 2**26 logits (256 MB in fp32).

    Raises:
        ConfigError: the model is no causal language model of Transformers, or chunk is no number of tokens.
        UnsupportedError: the model's loss is another than the cross-entropy of its (scaled, capped) logits.
    """
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ConfigError(f"chunk={chunk!r}: give a number of tokens, at least 1, or None.")
    head, rule = _parts(model)
    before = type(head)
    LossHead.adopt(head, chunk or max(64, CHUNK_LOGITS // model.config.get_text_config().vocab_size), rule)
    # A bound method, so that a deep copy of the model calls itself.
    model.forward = MethodType(_forward_of(type(model).forward), model)
    try:
        refuse_another_loss(model, head, rule)
    except UnsupportedError:
        head.__class__ = before
        del head.chunk, head.rule, model.forward
        raise
    return model


def _parts(model: Any) -> tuple[Any, LogitsRule]:
    """The output layer and the rule of its logits, of a model whose loss is known."""
    name = type(model).__name__
    get_head: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
    head, body = get_head(), getattr(model, "base_model", model)
    if head is None or body is model:
        raise ConfigError(
            f"{name} is no causal language model of Transformers with an output layer: the loss cannot be taken from it "
            "without its logits. Leave the chunked loss off."
        )
    if isinstance(head, LossHead):
        raise ConfigError(f"the loss of this {name} is computed without logits already: ask for it once.")
    for what, module in (("model", model), ("output layer", head)):
        if "forward" in vars(module):
            raise UnsupportedError(
                f"the {what} of this {name} has its forward replaced on the object (device_map and offloading hooks do that): "
                "load the model without them, or leave the chunked loss off."
            )
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        raise UnsupportedError(f"{name} has a loss function of its own, and only the usual cross-entropy can be chunked.")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UnsupportedError(
            f"{name} adds a load-balancing loss (output_router_logits), which the chunked loss would leave out. Set "
            "output_router_logits to false in the model's configuration, or leave the chunked loss off."
        )
    return head, LogitsRule.of(model)


def _forward_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model class with the loss taken from the output layer, if there are labels."""
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("labels") is None and given.get("shift_labels") is None:
            return original(self, *args, **kwargs)
        return _with_loss(self, given)

    return forward


def _with_loss(model: Any, given: dict[str, Any]) -> Any:
    kept = given.get("logits_to_keep", 0)
    if isinstance(kept, Tensor) or kept:
        raise ConfigError("logits_to_keep together with labels: the chunked loss has no logits to keep. Leave one out.")
    if given.get("output_router_logits"):
        raise UnsupportedError("output_router_logits=True adds a loss that the chunked loss leaves out. Leave one out.")
    head = model.get_output_embeddings()
    if not isinstance(head, LossHead) or type(head).forward is not LossHead.forward:
        raise ConfigError("the output layer was exchanged after use_chunked_loss: call it after get_losia_model.")
    outputs = model.base_model(**{name: value for name, value in given.items() if name not in _OF_THE_LOSS}, return_dict=True)
    hidden, ignore_index = outputs[0], given.get("ignore_index", -100)
    targets = given.get("shift_labels")
    if targets is None:  # token t's hidden state predicts token t + 1
        targets = functional.pad(given["labels"], (0, 1), value=ignore_index)[..., 1:]
    targets = targets.to(hidden.device)
    loss = head(hidden, targets, ignore_index)
    count = given.get("num_items_in_batch")
    if count is None:
        count = (targets != ignore_index).sum()
    loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
    output = CausalLMOutputWithPast(loss=loss, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions"))
    return output.to_tuple() if given.get("return_dict") is False else output
