"""Peak memory of one GPU, measured: real model class, real FSDP2, real LoSiA, one step on fake tensors.

PyTorch's FSDPMemTracker counts every storage that is alive. What it cannot see: the driver, NCCL's buffers, cuBLAS
workspaces and fragments of the caching allocator (`Cluster.reserve`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from losia_dist.errors import ConfigError
from losia_dist.planning.fake_model import FakeRun, fake_ranks, make_mesh, make_run
from losia_dist.planning.workload import Workload


@dataclass
class Simulation:
    """peak_bytes of one GPU, and what it consisted of at that moment, in the tracker's words."""

    peak_bytes: int
    parts: dict[str, int] = field(default_factory=dict)


def simulate(workload: Workload) -> Simulation:
    """One optimizer step, with the optimizer's state in place, and a re-localization, on fake tensors; nothing is sent.

    Raises:
        ConfigError: an engine that FSDP2's tracker does not follow, offloading, or a process that is one rank of several.
    """
    if workload.engine not in ("fsdp2", "hsdp") or workload.offload != "none":
        raise ConfigError(
            f"--simulate follows fsdp2 and hsdp without offload; --engine {workload.engine} --offload {workload.offload} is "
            "planned by formulas alone: leave out --simulate, or give --engine fsdp2."
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), fake_ranks(workload.cluster.gpus):
        warnings.simplefilter("ignore")
        run = make_run(workload, make_mesh(workload), mode)
        with mode:
            tokens = torch.zeros(workload.micro_batch, workload.sequence, dtype=torch.int64)
            tracker = FSDPMemTracker(run.model, run.optimizer)
            tracker.track_inputs((tokens, *_importance(run)))
            with tracker:
                run.step(tokens, workload.accumulation, tracker.reset_mod_stats)
                run.relocalize()
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    parts: dict[str, int] = {str(getattr(key, "value", key)): int(size) for key, size in snapshot.items()}
    return Simulation(parts.pop("Total"), {name: size for name, size in parts.items() if size})


def _importance(run: FakeRun) -> list[Tensor]:
    averages: list[Tensor] = []
    for site in run.localizing:
        accumulator: Any = site.gradient_sink
        averages += [accumulator.mean, accumulator.deviation]
    return averages
