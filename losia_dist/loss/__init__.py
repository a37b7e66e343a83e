"""The loss over a large vocabulary without its logits: in chunks of tokens."""

from losia_dist.loss.without_logits import use_chunked_loss

__all__ = ["use_chunked_loss"]
