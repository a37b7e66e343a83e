"""Names that differ between the torch releases this package supports."""

import inspect
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# torch 2.13 renamed both and warns at every call of the old names.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# DDP without sending buffers at every forward pass: indices change on all ranks alike.
_FORWARD_SYNC = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
DDP_KEEPS_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _FORWARD_SYNC else "broadcast_buffers": False}
