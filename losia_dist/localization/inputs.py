"""How large the input neurons of every layer are, from forward passes alone; and which of them stand out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from losia_dist.errors import ConfigError, DivergenceError
from losia_dist.localization.collectives import RowCollectives
from losia_dist.subnet.site import Site


@torch.no_grad()
def input_sizes(sites: list[Site], run_pass: Callable[[], None], collectives: RowCollectives) -> list[Tensor]:
    """Root mean square of each input neuron: float64 [X, n] a layer (X = 1, or experts), equal on all ranks, which all call.

    The mean is over the tokens of a call of the layer (padding among them), then over all calls and ranks; of an expert over
    the tokens that were sent to it, and the calls that sent it some. X (n + 1) numbers a layer are kept, and sent once. An
    expert that no token reached has sizes of zero.

    Args:
        run_pass: runs forward over this rank's micro-batches.

    Raises:
        ConfigError: a layer that no micro-batch of any rank calls. Same on every rank.
        DivergenceError: an input is not finite. Same on every rank.
    """
    device = sites[0].row_index.device
    totals = [torch.zeros(site.layout.count, site.shape[1] + 1, dtype=torch.float64, device=device) for site in sites]

    def watch(total: Tensor) -> Callable[[Tensor, int], None]:
        def add(inputs: Tensor, place: int) -> None:
            tokens = inputs.detach().flatten(0, -2)
            if tokens.shape[0]:  # an expert may get none
                norms = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float32)  # no fp32 copy of the tokens on a GPU
                total[place, :-1] += norms.square_().div_(tokens.shape[0])
                total[place, -1] += 1

        return add

    for site, total in zip(sites, totals, strict=True):
        site.input_sink = watch(total)
    try:
        run_pass()
    finally:
        for site in sites:
            site.input_sink = None
    flat = collectives.sum_columns(torch.cat([total.view(-1) for total in totals]))
    parts = flat.split([total.numel() for total in totals])
    totals = [part.view(total.shape) for part, total in zip(parts, totals, strict=True)]
    calls = torch.stack([total[:, -1].sum() for total in totals]).tolist()
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
    return [(total[:, :-1] / total[:, -1:].clamp(min=1)).sqrt() for total in totals]


def outliers_of(site: Site, sizes: Tensor, limit: float) -> dict[str, list[int]]:
    """Input neurons larger than `limit` times the median one of their layer (or expert), ascending, by `Site.matrix_names`;
    none where the subnet takes all columns.

    No communication; waits for the device.

    Args:
        sizes: float64 [X, n], from `input_sizes`.

    Raises:
        ConfigError: fewer neurons than the subnet takes are within the limit.
    """
    if site.takes_all_columns:
        return {}
    outlying: list[list[bool]] = (sizes > limit * sizes.median(1, keepdim=True).values).tolist()
    found = {name: [j for j, out in enumerate(own) if out] for name, own in zip(site.matrix_names, outlying, strict=True)}
    taken = site.col_index.shape[-1]
    for name, own in found.items():
        within = site.shape[1] - len(own)
        if within < taken:
            raise ConfigError(
                f"outlier_limit={limit}: {within} of {site.shape[1]} input neurons of {name} are within it, and its "
                f"subnet takes {taken}. Raise outlier_limit, or lower rank_factor."
            )
    return {name: own for name, own in found.items() if own}
