"""Ranks that share each sequence under DeepSpeed's Ulysses: who they are, and the scale that DeepSpeed gives their gradients.

Each of the `size` ranks of a sequence group computes with its own part of every sequence. Its loss is that of the whole
sequence, gathered over the group, so that its local gradient is `size` times its part of the gradient: the mean over all ranks
is the gradient. DeepSpeed 0.19 divides by the data-parallel ranks alone in stages 0, 1 and 2, and in stage 3 with
"reduce_scatter": false: those gradients come out `size` times too large, which Adam hides and clipping does not.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from losia_dist.errors import UnsupportedError
from losia_dist.ranks.agreement import Agreement

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequenceRanks:
    """The sequence group of this rank.

    Attributes:
        size: its ranks; 1 without sequence parallelism.
        group: LoSiA's own over them; None where this rank computes whole sequences.
        engine: the DeepSpeed engine that trains, or None.
    """

    size: int = 1
    group: dist.ProcessGroup | None = None
    engine: Any = None

    @property
    def max_norm(self) -> float | None:
        """The norm that the engine clips gradients to, 0 for none; None: there is no engine, and the loop clips by itself."""
        return None if self.engine is None else float(self.engine.gradient_clipping())

    def reduced_norm(self) -> float | None:
        """The norm of all gradients before clipping, as the engine took it in its latest step; None: it does not say."""
        norm = None if self.engine is None else self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @classmethod
    def of(cls, model: Any, optimizer: Any, agreement: Agreement) -> SequenceRanks:
        """Find them by the engine that holds the model; called by all ranks, which make process groups where there are some.

        From here on DeepSpeed's gradients are the mean over all ranks.

        Raises:
            UnsupportedError: sequence groups that are not made of neighbouring ranks. Same on every rank.
        """
        if sys.modules.get("deepspeed") is None:
            return cls()
        from losia_dist.sharding.handed_over import engine_of

        engine = engine_of(model, optimizer)
        size = 1 if engine is None else int(engine.sequence_parallel_size)
        if engine is None or size == 1:
            return cls(engine=engine)
        mine = sorted(dist.get_process_group_ranks(engine.seq_parallel_group))
        groups = sorted({tuple(ranks) for ranks in agreement.gather(mine)})
        if [rank for ranks in groups for rank in ranks] != list(range(dist.get_world_size())):
            raise UnsupportedError(
                f"the sequence groups of this engine are {[list(ranks) for ranks in groups]}: each must be made of "
                "neighbouring ranks, and all of them together of every rank once. Let DeepSpeed make them "
                "(sequence_parallel_size)."
            )
        made = {ranks: dist.new_group(list(ranks)) for ranks in groups}  # by all ranks, in one order
        if average_over_all_ranks(engine) and agreement.rank == 0:
            logger.warning(
                "sequence parallelism over %d ranks: DeepSpeed would make gradients %d times too large here, and clip by them; "
                "they are averaged over all ranks instead.",
                size,
                size,
            )
        return cls(size, made[tuple(mine)], engine)


def average_over_all_ranks(engine: Any) -> bool:
    """Let an engine divide gradients by all ranks, and not by those with different data alone; whether it would not have."""
    optimizer, size = engine.optimizer, engine.sequence_parallel_size
    if getattr(optimizer, "sequence_parallel_size", 1) > 1:  # ZeRO
        optimizer.sequence_parallel_size = 1
        # Stage 3 divides by all ranks where it scatters gradients by itself.
        return not (engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter())
    by_engine = not hasattr(optimizer, "sequence_parallel_size")  # stage 0, BF16_Optimizer
    if by_engine and "allreduce_no_retain" not in vars(engine):
        reduce = engine.allreduce_no_retain

        def allreduce_no_retain(bucket: Any, dp_group: Any, *args: Any, dp_world_size: Any = None, **kwargs: Any) -> Any:
            ranks = None if dp_world_size is None else dp_world_size * size
            return reduce(bucket, dp_group, *args, dp_world_size=ranks, **kwargs)

        engine.allreduce_no_retain = allreduce_no_retain
        return True
    return False
