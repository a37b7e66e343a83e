"""MLPs that compute a micro-batch in tiles (DeepSpeed's TiledMLP) against one process that computes it whole."""

from dataclasses import replace

import pytest
import torch

from losia_dist import Located
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.sequences import Run, reference, train

TILED = Run(steps=10, accumulation=2, max_grad_norm=0.2, tiles=3)
CASES = {
    "ZeRO-3": (TILED, 3, 2),
    "ZeRO-2": (TILED, 2, 2),
    "ZeRO-1": (TILED, 1, 2),
    "stage 0": (TILED, 0, 2),
    "ZeRO-2, each rank its own sequences": (TILED, 2, 1),
    "ZeRO-3, more tiles than parts of equal size": (replace(TILED, tiles=7), 3, 2),
    "ZeRO-3, one token at most": (replace(TILED, batch=1, accumulation=1, tiles=9), 3, 2),
    "ZeRO-3, recomputed, packed": (replace(TILED, checkpointing=True, packed=True), 3, 2),
    "ZeRO-1, one sequence": (replace(TILED, batch=1), 1, 2),
    "MLPs alone": (replace(TILED, config={**TILED.config, "target_modules": ["gate_proj", "up_proj", "down_proj"]}), 2, 2),
    "located before": (
        replace(TILED, steps=5, calibration=2, config={**TILED.config, "selection": Located(start="importance")}),
        3,
        2,
    ),
}


@pytest.mark.parametrize("case", [name if name in ("ZeRO-3",) else slow(name) for name in CASES])
def test_tiles_train_as_the_whole(ranks, case):
    run, stage, size = CASES[case]
    wanted = reference(run)
    for result in ranks(2, train, run, stage, size):
        assert_same_run(result, wanted)
        for weight, (rows, columns) in wanted["first"].items():
            assert torch.equal(result["first"][weight][0], rows) and torch.equal(result["first"][weight][1], columns), weight
        if stage:
            torch.testing.assert_close(torch.tensor(result["norms"]), torch.tensor(wanted["norms"]), rtol=1e-4, atol=0)
