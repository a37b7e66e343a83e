"""The learning rate's schedule: a linear warmup, then a cosine to a share of the peak.

Transformers has the same, in a module that imports PEFT and bitsandbytes where they are installed: a second of every start.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_schedule(optimizer: Optimizer, warmup: int, steps: int, least: float) -> LambdaLR:
    """The factor on the learning rate in each optimizer step: from 0 in `warmup` steps to 1, and in the rest to `least`."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        done = (step - warmup) / max(1, steps - warmup)
        return max(0.0, least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done)))

    return LambdaLR(optimizer, factor)
