"""Whether a model's loss without logits is the loss it computes by itself: both are run on made-up logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from losia_dist.errors import UnsupportedError
from losia_dist.loss.chunked import chunked_cross_entropy
from losia_dist.loss.logits import LogitsRule

TOKENS, CHUNK, SIZE = 12, 5, 20.0  # SIZE: of the logits, large enough for capping and scaling to show


class _Hidden(BaseModelOutputWithPast):
    """The output of a model's body: hidden states, and None for whatever else is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _StandIn:
    """A body and an output layer without weights: the hidden state of a token is its place, which picks its logits."""

    def __init__(self, head: Any, rule: LogitsRule, vocabulary: int) -> None:
        self.head, self.rule = head, rule
        device = torch.device("cpu") if head.weight.is_meta else head.weight.device
        generator = torch.Generator().manual_seed(0)  # nothing is taken from the global one
        made = torch.randn(TOKENS, vocabulary, generator=generator) * SIZE
        self.logits = made.to(device, head.weight.dtype)
        self.tokens = torch.randint(0, vocabulary, (1, TOKENS), generator=generator).to(device)
        self.hidden = torch.arange(TOKENS).to(self.logits).view(1, TOKENS, 1).expand(1, TOKENS, 4).contiguous()
        self.seen: list[set[int]] = []  # of each call of the body, its tensors by id

    def body(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append({id(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)})
        return _Hidden(last_hidden_state=self.hidden)

    def project(self, hidden: Tensor) -> Tensor:
        return self.logits[hidden[..., 0].round().long().clamp(0, TOKENS - 1)]

    def head_forward(self, hidden: Tensor, targets: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        if targets is None:
            return self.project(hidden)
        settings: dict[str, Any] = {"chunk": CHUNK, "rule": self.rule, "ignore_index": ignore_index}
        return chunked_cross_entropy(self.head, self.project, hidden, targets, **settings)


@torch.no_grad()
def refuse_another_loss(model: Any, head: Any, rule: LogitsRule) -> None:
    """Compare `model.forward` with its class's own, a stand-in in the place of body and output layer. Needs no weights.

    Raises:
        UnsupportedError: the two differ, or the model's own does not run this way.
    """
    name = type(model).__name__
    stand_in = _StandIn(head, rule, model.config.get_text_config().vocab_size)
    labels = stand_in.tokens.clone()
    labels[0, :2] = -100
    try:
        with _replaced(model, head, stand_in):
            own, ours = (
                float(forward(input_ids=stand_in.tokens, labels=labels, use_cache=False, num_items_in_batch=3).loss)
                for forward in (type(model).forward.__get__(model), model.forward)
            )
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UnsupportedError(
            f"the loss of {name} could not be compared with the one computed without logits ({error}). Leave the chunked loss "
            "off for this model."
        ) from error
    if len(stand_in.seen) != 2 or stand_in.seen[0] != stand_in.seen[1] or not abs(own - ours) <= 1e-3 * abs(own):
        raise UnsupportedError(
            f"{name} does more to its inputs, its logits or its loss than is known here: its own loss of a made-up batch is "
            f"{own:.5g}, and the one computed without logits {ours:.5g}. Leave the chunked loss off for this model."
        )


@contextmanager
def _replaced(model: Any, head: Any, stand_in: _StandIn) -> Iterator[None]:
    places: list[tuple[nn.Module, Any]] = [(model.base_model, stand_in.body)]
    with suppress(AttributeError, ValueError, NotImplementedError):
        places.append((model.get_decoder(), stand_in.body))  # some models call this part of the body themselves
    places.append((head, stand_in.head_forward))
    before = [vars(module).get("forward") for module, _ in places]
    for module, forward in places:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), forward in zip(places, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
