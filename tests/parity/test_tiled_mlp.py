"""MLPs that compute a micro-batch in tiles (DeepSpeed's TiledMLP) against one process that computes it whole."""

from dataclasses import replace

import pytest
import torch

from losia_dist import Located
from tests.support import sequences
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.sequences import Run, reference, train

TILED = Run(steps=10, accumulation=2, max_grad_norm=0.2, tiles=3)
CASES = {
    "ZeRO-3": (replace(TILED, steps=6), 3, 2),
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
    "located before, on shared columns": (
        replace(
            TILED, steps=5, calibration=2, config={**TILED.config, "selection": Located(start="importance", share_columns=True)}
        ),
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


def mlps(model):
    return [module for module in model.modules() if type(module).__name__ == "LlamaMLP"]


def by_sequence_tiled_compute(model, tiles):
    from deepspeed.runtime.sequence_parallel.ulysses_sp import sequence_tiled_compute

    for module in mlps(model):
        whole = module.forward

        def forward(x, module=module, whole=whole):
            return sequence_tiled_compute(
                lambda x: whole(x),
                seqlen=x.shape[1],
                shards=tiles,
                kwargs_to_shard={"x": x},
                kwargs_to_pass={},
                grad_requiring_tensor_key="x",
                compute_params=[p for p in module.parameters() if p.requires_grad],
                output_unshard_dimension=1,
                output_reduction=None,
            )

        module.forward = forward


def as_deepspeed_shows_it(model, tiles):
    """compute_params are the weights, which are frozen here."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    for module in mlps(model):

        def forward(x, module=module):
            weights = [module.down_proj.weight, module.gate_proj.weight, module.up_proj.weight]
            return TiledMLP.apply(lambda self, x: type(self).forward(self, x), module, x, tiles, weights)

        module.forward = forward


def train_by(how, run, stage, size):
    kept, sequences.use_tiled_mlp = sequences.use_tiled_mlp, how
    try:
        return train(run, stage, size)
    finally:
        sequences.use_tiled_mlp = kept


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_sequence_tiled_compute_that_waits_for_the_subnets_trains_so_too(ranks, stage):
    wanted = reference(TILED)
    for result in ranks(2, train_by, by_sequence_tiled_compute, TILED, stage, 2):
        assert_same_run(result, wanted)


@pytest.mark.slow
def test_tiles_that_wait_for_frozen_weights_stop_where_gradients_are_cut(ranks):
    """As DeepSpeed's own example has it; docs/long-context.md says what to give instead."""
    for kind, message in ranks.errors(2, train_by, as_deepspeed_shows_it, TILED, 2, 2):
        assert kind == "AssertionError" and "has already been reduced" in message
