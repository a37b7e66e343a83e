"""Random number generators of one rank: Python's, NumPy's, torch's on the CPU and on the current CUDA device."""

from __future__ import annotations

import logging
import random
import zlib
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def read() -> dict[str, Any]:
    """States as nested plain values, tensors and arrays."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Go on where `read` was called."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
        else:
            logger.warning("the checkpoint was saved without a GPU: the GPU's random state goes on from this process's seed.")


def seed_new_rank(first: dict[str, Any], rank: int) -> None:
    """Seed a rank that the saved run did not have, from its rank 0: the same every time the checkpoint is loaded there."""
    seed = zlib.crc32(first["torch"].numpy().tobytes() + rank.to_bytes(4, "little"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    logger.warning("rank %d was not part of the saved run: its random numbers start from a seed made of rank 0's state.", rank)
