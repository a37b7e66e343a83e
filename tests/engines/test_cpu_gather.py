"""FSDP2's all-gather on the CPU: the bits of gloo's own, in memory that is there already."""

import pytest
import torch
import torch.distributed as dist

from losia_dist.ranks.compat import all_gather_flat
from losia_dist.recipe import cpu_gather
from losia_dist.recipe.cpu_gather import InPlaceAllGather


def gather(count: int, is_view: bool) -> tuple[bool, bool]:
    """Whether the output has the bits of gloo's all-gather, and whether it was called for it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    own = torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
    expected, called = torch.empty(world * count, dtype=torch.bfloat16), []
    all_gather_flat(expected, own)
    comm = InPlaceAllGather()
    output = comm.allocate((world * count,), dtype=torch.bfloat16, device=torch.device("cpu"))
    part = output[rank * count : (rank + 1) * count]
    if is_view:
        part.copy_(own)
    kept = cpu_gather.all_gather_flat
    cpu_gather.all_gather_flat = lambda *given, **options: called.append(given) or kept(*given, **options)
    try:
        assert comm(output, part if is_view else own, dist.group.WORLD) is None
    finally:
        cpu_gather.all_gather_flat = kept
    return torch.equal(output.view(torch.int16), expected.view(torch.int16)), bool(called)


@pytest.mark.parametrize("count, is_small", [(1 << 20, False), (3, True)])
@pytest.mark.parametrize("is_view", [True, False])  # FSDP2 gives its part inside the output, or apart from it
def test_it_gathers_the_same_bits(ranks, count, is_small, is_view):
    assert ranks(2, gather, count, is_view) == [(True, is_small)] * 2
