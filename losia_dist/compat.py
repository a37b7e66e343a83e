"""Names that differ between the torch releases this package supports."""

import torch.distributed as dist

# torch 2.13 renamed both and warns at every call of the old names.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
