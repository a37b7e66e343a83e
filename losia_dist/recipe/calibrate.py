"""First subnets from calibration batches in the training script: from the first batches that training will see."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from losia_dist.recipe.engines import Engine


def locate_first_subnets(run: Engine, loader: Any) -> str:
    """Locate the subnets of a run that has not begun; called by all ranks. Returns a line about it.

    Args:
        loader: of the training data; this rank's first `calibration_batches` batches of the first epoch are used.
    """
    assert run.losia is not None
    loader.sampler.set_epoch(0)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the order of the training data stays what it is without calibration
        mine = list(itertools.islice(loader, run.losia.config.calibration_batches))
    mine = [{name: value.to(run.device) for name, value in batch.items()} for batch in mine]
    passes = run.losia.locate(mine, run.calibration_loss)
    did = "located" if run.losia.config.located is not None else "drawn without outliers"
    return f"subnets {did} from {len(mine)} batches a rank, in {passes} pass(es), {time.perf_counter() - began:.0f} s"
