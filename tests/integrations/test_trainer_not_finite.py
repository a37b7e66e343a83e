"""A step that is not finite ends the Trainer's run on every rank, and the last good checkpoint stays."""

import pytest

from tests.support.cases import slow
from tests.support.trainers import close, fresh_accelerate, trainer_of
from tests.support.training import Run

# Drawn subnets: nothing collects importance, which would notice at a slot's end.
RUN = Run(steps=8, config={"rank_factor": 0.25, "period": 2, "selection": "random"})
BAD = 4


def train_on_a_bad_batch(directory: str, engine: str) -> None:
    with fresh_accelerate():
        trainer = trainer_of(directory, engine, RUN, save_strategy="steps", save_steps=2, save_total_limit=1)
        plain = trainer.compute_loss

        def compute_loss(*args, **kwargs):
            return plain(*args, **kwargs) * (float("nan") if trainer.state.global_step == BAD else 1.0)

        trainer.compute_loss = compute_loss
        try:
            trainer.train()
        finally:
            close(trainer)


@pytest.mark.parametrize("engine", [slow("ddp"), "zero2", slow("zero3"), "fsdp2"])
def test_the_run_ends_on_every_rank_and_the_last_good_checkpoint_stays(ranks, tmp_path, engine):
    errors = ranks.errors(2, train_on_a_bad_batch, str(tmp_path), engine)
    assert [kind for kind, _ in errors] == ["DivergenceError"] * 2
    assert all(f"in step {BAD + 1}; " in message for _, message in errors)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{BAD}"]
