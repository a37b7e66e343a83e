"""The lives of `benchmarks.whole_life`: how each is started, and with which settings of LoSiA and of DeepSpeed."""

from __future__ import annotations

import sys
from dataclasses import dataclass

# The short preset with a quarter of its columns: as it is its 408 M numbers would bring a 7B to 22 GB by the plan alone.
DRAWN = """rank_factor: [1.0, 0.015625]
selection:
  drawn: {outlier_limit: 4, calibration_batches: 2}
period: 2
layers_per_slot: auto
cycles: 5
rewarm_steps: 0
reset_bias_correction: false
"""
# Of 2 ranks each gathers whole weights, twice while they are copied out of the buffer: 4.4 GB for a 7B's output layer, which
# leaves room for smaller subnets only, and for shorter rows.
SHARDED, SHARDED_TOKENS = DRAWN.replace("0.015625", "0.001953125"), 32
# The published form, every layer's first subnets located before the first step; slots so short that some end in 20 steps.
LOCATED = """rank_factor: 0.125
selection:
  located: {start: importance, calibration_batches: 1}
period: 4
layers_per_slot: 1
"""
# Gathered weights go at once, none is fetched ahead, and buckets have the largest subnet's size: what they cost is memory.
ZERO3 = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 2_000_000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 1,
        "stage3_max_reuse_distance": 1,
        "stage3_param_persistence_threshold": 100_000,
    },
    "steps_per_print": 1_000_000_000,
}


@dataclass(frozen=True)
class Part:
    """One life: how it is started, and what the plan is asked."""

    what: str
    engine: str  # of the plan
    ranks: int = 1
    tokens: int = 64  # of a record
    losia: str = DRAWN
    launcher: tuple[str, ...] = (sys.executable,)
    options: tuple[str, ...] = ()


_TWO_RANKS = (sys.executable, "-m", "benchmarks.ranks", "2")
PARTS: dict[str, Part] = {
    "drawn": Part("one process, drawn subnets", "ddp"),
    "located": Part("one process, located subnets", "ddp", losia=LOCATED),
    "fsdp2": Part(
        "2 ranks, FSDP2, drawn subnets",
        "fsdp2",
        ranks=2,
        tokens=SHARDED_TOKENS,
        losia=SHARDED,
        launcher=_TWO_RANKS,
        # Embeddings and output layer in units of their own: else each rank has both whole for all of forward and backward.
        options=("--sharding", "fsdp2", "--shard_layers", "Qwen2DecoderLayer", "Embedding", "Linear"),
    ),
    "zero3": Part(
        "2 ranks, ZeRO-3, drawn subnets",
        "zero3",
        ranks=2,
        tokens=SHARDED_TOKENS,
        losia=SHARDED,
        launcher=_TWO_RANKS,
        options=("--deepspeed", "ZERO3"),
    ),
}
