"""What a language model does to its output layer's result before the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitsRule:
    """logits <- logits / divisor, then cap * tanh(logits / cap).

    divisor: Granite's `logits_scaling`; one over Cohere's `logit_scale`. cap: Gemma's `final_logit_softcapping`; None: none.
    """

    divisor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> LogitsRule:
        """The rule of a Transformers model, by the names above. Whether it is all that the model does is for a probe to say."""
        config = model.config.get_text_config()
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        scale = getattr(model, "logit_scale", None)
        if isinstance(scale, int | float) and scale:
            divisor /= scale
        return cls(divisor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [..., V] -> [..., V] in their own dtype, as the models do it before their loss is computed in fp32."""
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits
