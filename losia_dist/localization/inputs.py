"""How large the input neurons of every layer are, from forward passes alone; and which of them stand out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from losia_dist.errors import ConfigError, DivergenceError
from losia_dist.localization.collectives import RowCollectives
from losia_dist.subnet.site import Site


@torch.no_grad()
def input_sizes(sites: list[Site], run_pass: Callable[[], None], collectives: RowCollectives) -> list[Tensor]:
    """Root mean square of each input neuron: float64 [n] a layer, equal on all ranks, which all call.

    The mean is over the tokens of a call of the layer (padding among them), then over all calls and ranks. n + 1 numbers a
    layer are kept, and sent once.

    Args:
        run_pass: runs forward over this rank's micro-batches.

    Raises:
        ConfigError: a layer that no micro-batch of any rank calls. Same on every rank.
        DivergenceError: an input is not finite. Same on every rank.
    """
    device = sites[0].row_index.device
    totals = [torch.zeros(site.shape[1] + 1, dtype=torch.float64, device=device) for site in sites]

    def watch(total: Tensor) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].detach().flatten(0, -2)
            if tokens.shape[0]:  # an expert may get none
                norms = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float32)  # no fp32 copy of the tokens on a GPU
                total[:-1] += norms.square_().div_(tokens.shape[0])
                total[-1] += 1

        return add

    handles = [site.module.register_forward_pre_hook(watch(total)) for site, total in zip(sites, totals, strict=True)]
    try:
        run_pass()
    finally:
        for handle in handles:
            handle.remove()
    flat = collectives.sum_columns(torch.cat(totals))
    totals = list(flat.split([total.numel() for total in totals]))
    calls = torch.stack([total[-1] for total in totals]).tolist()
    idle = [site.name for site, count in zip(sites, calls, strict=True) if count == 0]
    if idle:
        raise ConfigError(
            f"no calibration batch reached {', '.join(idle[:5])}: the forward pass never calls the layer (leave it out of "
            "target_modules), or more calibration batches are needed."
        )
    finite = torch.stack([torch.isfinite(total).all() for total in totals]).tolist()
    broken = [site.name for site, fine in zip(sites, finite, strict=True) if not fine]
    if broken:
        raise DivergenceError(
            f"the inputs of {', '.join(broken[:5])} are not finite in the calibration batches, before any training. Check the "
            "weights that were loaded, and their dtype."
        )
    return [(total[:-1] / total[-1]).sqrt() for total in totals]


def outliers_of(site: Site, sizes: Tensor, limit: float) -> list[int]:
    """Input neurons larger than `limit` times the layer's median one, ascending; none where the subnet takes all columns.

    No communication; waits for the device.

    Args:
        sizes: float64 [n], from `input_sizes`.

    Raises:
        ConfigError: fewer neurons than the subnet takes are within the limit.
    """
    if site.takes_all_columns:
        return []
    found = (sizes > limit * sizes.median()).nonzero().squeeze(1).tolist()
    within, taken = site.shape[1] - len(found), site.col_index.numel()
    if within < taken:
        raise ConfigError(
            f"outlier_limit={limit}: {within} of {site.shape[1]} input neurons of {site.name} are within it, and its "
            f"subnet takes {taken}. Raise outlier_limit, or lower rank_factor."
        )
    return list(found)
