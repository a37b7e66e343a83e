"""Cross-entropy of an output layer over chunks of tokens: only one chunk's logits exist at a time.

Dimensions in names: t tokens, n hidden size. Backward computes each chunk's logits again: one more matmul of the output
layer, for (1 - chunk / t) of the logits' memory, which for 4,096 tokens and 128 k words is 2 GB in fp32, several times over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from losia_dist.loss.logits import LogitsRule
from losia_dist.subnet.linear import SubnetLinear

# Logits of one chunk, if the number of tokens is left open: 256 MB in fp32, and a matmul large enough for any device.
CHUNK_LOGITS = 2**26


def chunked_cross_entropy(
    head: nn.Module,
    project: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    rule: LogitsRule,
    ignore_index: int,
) -> Tensor:
    """Sum over the tokens of the cross-entropy of rule(project(hidden)), computed in fp32; an fp32 scalar.

    Called by the head's own forward, so that an engine gathers the head's weight once for all chunks, and gathers it again
    once for backward: nothing is communicated inside, and ranks may have different numbers of chunks.

    Args:
        head: whose trainable parameters get a gradient, each one gradient per call.
        project: the head's forward without its hooks.
        hidden: [..., n], any floating dtype. targets: int64, hidden's shape but for n.
        chunk: tokens of one chunk.
    """
    trained = _trained(head)
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def loss_of(piece: Tensor, piece_targets: Tensor) -> Tensor:
        logits = rule(project(piece)).float()
        return functional.cross_entropy(logits, piece_targets, ignore_index=ignore_index, reduction="sum")

    return _ChunkedLoss.apply(flat_hidden, flat_targets, head, loss_of, chunk, *trained)


def _trained(head: nn.Module) -> list[nn.Parameter]:
    return [p for p in head.parameters() if p.requires_grad]


class _ChunkedLoss(torch.autograd.Function):
    """Forward keeps the hidden states; backward runs forward again chunk by chunk and differentiates it there.

    Gradients are returned, not accumulated from inside, so that every hook of an engine on a parameter runs once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
        *trained: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, targets)
        # The head, not its parameters: a sharded engine empties them after forward and fills them again before backward.
        ctx.head, ctx.loss_of, ctx.chunk, ctx.trains = head, loss_of, chunk, len(trained)
        device = hidden.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for piece, piece_targets in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            total += loss_of(piece, piece_targets)
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        trained = _trained(ctx.head) if ctx.trains else []
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums = [GradientSum() for _ in trained]
        device, dtype, enabled = ctx.autocast
        pieces = zip(hidden.split(ctx.chunk), targets.split(ctx.chunk), strict=True)
        with torch.enable_grad(), torch.autocast(device, dtype, enabled), _one_sink_call(ctx.head):
            for place, (piece, piece_targets) in enumerate(pieces):
                leaf = piece.detach().requires_grad_(grad_hidden is not None)
                wanted = ([] if grad_hidden is None else [leaf]) + trained
                found = torch.autograd.grad(ctx.loss_of(leaf, piece_targets), wanted, grad_loss, allow_unused=True)
                if grad_hidden is not None:
                    grad_hidden[place * ctx.chunk : place * ctx.chunk + len(piece)] = found[0]
                    found = found[1:]
                for sum_, part in zip(sums, found, strict=True):
                    sum_.add(part)
        gradients = [None if s.total is None else s.total.to(p.dtype) for s, p in zip(sums, trained, strict=True)]
        return grad_hidden, None, None, None, None, *gradients


class GradientSum:
    """A sum over chunks, in fp32 from the second on: a bf16 sum would lose what one matmul over all tokens keeps."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.owned = False

    def add(self, part: Tensor | None) -> None:
        if part is None:
            return
        if self.total is None:
            self.total = part  # may be shared with whoever made it
        elif self.owned:
            self.total.add_(part)
        else:
            self.total, self.owned = self.total.float().add(part), True


@contextmanager
def _one_sink_call(head: nn.Module) -> Iterator[None]:
    """The gradients that a layer's sink would get chunk by chunk reach it as one: it is to see one a micro-batch."""
    site = head.site if isinstance(head, SubnetLinear) else None
    if site is None or site.gradient_sink is None:
        yield
        return
    sink, sum_ = site.gradient_sink, GradientSum()
    seen: list[tuple[torch.dtype, Tensor]] = []  # the gradient's dtype, and the weight

    def collect(gradient: Tensor, weight: Tensor) -> None:
        sum_.add(gradient)
        seen[:] = [(gradient.dtype, weight)]

    site.gradient_sink = collect
    try:
        yield
    finally:
        site.gradient_sink = sink
    if sum_.total is not None:
        dtype, weight = seen[0]
        sink(sum_.total.to(dtype), weight)
