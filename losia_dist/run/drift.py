"""Whether the ranks' gradients are reduced at all: a model that nothing wraps trains a model of its own on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from losia_dist.errors import DivergenceError
from losia_dist.ranks.fingerprint import fingerprint
from losia_dist.run.checks import check_agreement
from losia_dist.run.parts import RunParts


class DriftCheck:
    """After each step, until one has changed the subnets: every rank's are the same. One collective of a number a layer.

    Of weights that every rank holds whole (one process, DDP, ZeRO-1 and 2, a plain loop that reduces gradients itself);
    sharded ones exist once. Made and called by all ranks.
    """

    def __init__(self, parts: RunParts) -> None:
        self._layers, self._collectives = parts.sites, parts.collectives
        self._needless = self._collectives.world_size == 1 or not parts.parameters.weight_is_resident
        self._before = torch.zeros(0) if self._needless else self._prints()

    def verify(self) -> bool:
        """Whether the check is done; call again after the next step if not.

        Raises:
            DivergenceError: on every rank: the subnets differ, since no gradient was reduced, or as `check_relocalized`
                where most ranks agree.
        """
        if self._needless:
            return True
        mine = self._prints()
        changed = (mine != self._before).any().to(mine.dtype).view(1)
        self._before = mine
        ranks = self._collectives.world_size
        everyone = self._collectives.stack(torch.cat([mine, changed])).view(ranks, -1).tolist()
        for site, values in zip(self._layers, zip(*everyone, strict=True), strict=False):
            if len(set(values)) > 1 and 2 * max(map(values.count, values)) > ranks:  # most are alike: one is faulty
                check_agreement(self._layers, mine[:, None], ("values",), self._collectives)
            elif len(set(values)) > 1:
                raise DivergenceError(
                    f"the subnet of {site.name} differs between ranks after an optimizer step: nothing reduces the gradients, "
                    "so that every rank trains a model of its own. The model is not wrapped: wrap it "
                    "(DistributedDataParallel, fully_shard, DeepSpeed, accelerator.prepare) before the optimizer and "
                    "LoSiA(...) are made and run the wrapped model, or all-reduce the gradients before optimizer.step(). A "
                    "plain Trainer stays unwrapped after evaluate() or predict() before train(): call them later, or use "
                    "LoSiATrainer. Ranks that are to train models of their own: process_group=dist.new_group([rank])."
                )
        return any(theirs[-1] for theirs in everyone)

    def _prints(self) -> Tensor:
        return torch.stack([fingerprint(site.subnet) for site in self._layers])
