"""CUDA graphs, which replay kernels and no Python. What a layer with a subnet does follows from its site's state, which Python
asks in every call (does it localize, must the subnet be written), so that a replay would be silently wrong once it has changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losia_dist.errors import UnsupportedError

# Of our operators: Inductor leaves them out of the graphs that it captures (mode="reduce-overhead", "max-autotune").
NEVER_CAPTURED = (torch.Tag.cudagraph_unsafe,)


def refuse_capture(name: str, given: Tensor) -> None:
    """Called with what a layer or weight of this name computes from. Nothing is asked of a device but a GPU, nor waited for.

    Raises:
        UnsupportedError: it computes inside a CUDA graph that is being captured.
    """
    if given.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"{name} runs while a CUDA graph is captured, and a replay would neither write its subnet nor locate another: take "
            "layers with subnets out of torch.cuda.graph and make_graphed_callables. torch.compile leaves them out by itself "
            "where torch._inductor.config.graph_partition is on: turn it on, or leave out mode='reduce-overhead'."
        )
