"""An output layer that can be asked for the loss instead of the logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.loss.chunked import chunked_cross_entropy
from losia_dist.loss.logits import LogitsRule


class LossHead(nn.Module):
    """A module that maps hidden states [..., n] to logits [..., V], and given targets to their summed cross-entropy.

    The loss is computed in the module's own call, where every engine has its weight whole; see `chunked_cross_entropy`.

    Attributes:
        chunk: tokens of one chunk.
    """

    chunk: int
    rule: LogitsRule
    loss_of_chunks: Any

    @classmethod
    def adopt(cls, head: Any, chunk: int, rule: LogitsRule) -> LossHead:
        """Turn an output layer in place into one that can; its class, parameters and names stay what they were otherwise."""
        kind: Any = type(head)
        head.__class__ = _with_loss(kind)
        head.chunk, head.rule = chunk, rule
        # Backward runs autograd itself, which a compiled graph cannot hold. Here, since torch.compiler imports for a second.
        head.loss_of_chunks = torch.compiler.disable(chunked_cross_entropy)
        return head

    def forward(self, input: Tensor, targets: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        """Logits [..., V] without targets; with targets the fp32 sum [] of their losses.

        input: hidden states [..., n], any floating dtype. targets: int64 [...], one per hidden state.
        """
        project: Any = super().forward
        if targets is None:
            return project(input)
        settings: Any = {"chunk": self.chunk, "rule": self.rule, "ignore_index": ignore_index}
        return self.loss_of_chunks(self, project, input, targets, **settings)


@cache
def _with_loss(kind: type[nn.Module]) -> type[LossHead]:
    return type(f"Loss{kind.__name__}", (LossHead, kind), {})
