"""An evaluation in the middle of training changes nothing: losses, weights and selections stay the same to the last bit."""

import pytest
import torch

from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, train

RUN = Run(steps=16, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3})


def train_with_evaluations(engine_name: str, run: Run):
    """Evaluates before and after every second optimizer step, in mid slot and at its ends; on every rank."""
    tokens = torch.arange(24).reshape(2, 12)

    def evaluate(stage, losia, engine):
        if losia.steps % 2:
            return
        model = losia.model if engine is None else engine
        model.eval()
        with torch.no_grad():
            assert torch.isfinite(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
        model.train()

    return train(engine_name, run, evaluate)


@pytest.mark.parametrize("engine", ["one", "ddp", slow("zero2"), slow("zero3"), "fsdp2", slow("fsdp2-noreshard")])
def test_an_evaluation_in_the_middle_changes_nothing(ranks, engine):
    if engine == "one":
        pairs = [(train_with_evaluations(engine, RUN), train(engine, RUN))]
    else:
        pairs = zip(ranks(2, train_with_evaluations, engine, RUN), ranks(2, train, engine, RUN), strict=True)
    for evaluated, undisturbed in pairs:
        assert evaluated["losses"] == undisturbed["losses"]
        assert_same_run(evaluated, undisturbed, tolerance=0.0)
