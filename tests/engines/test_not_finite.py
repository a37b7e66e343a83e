"""A step by gradients that are not finite ends every engine's run, on all ranks alike, though one rank's batch was to blame."""

import pytest
import torch.distributed as dist

from tests.support.cases import grid
from tests.support.training import Run, train, variant

DRAWN = {"rank_factor": 0.25, "period": 2, "selection": "random"}  # nothing collects importance, which would notice
RUN = Run(steps=4, max_grad_norm=0.5, config=DRAWN)


def train_with_a_bad_batch(engine: str, run: Run) -> None:
    def spoil(model):
        forward, calls = model.forward, []

        def spoiled(*args, **kwargs):
            output = forward(*args, **kwargs)
            calls.append(1)
            if len(calls) == 2 and dist.get_rank() == 1:
                output["loss"] = output["loss"] * float("nan")
            return output

        model.forward = spoiled

    train(engine, run, prepare=spoil)


ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "fsdp2", "fsdp2-offload")


@pytest.mark.parametrize(
    "engine, dtype", grid(ENGINES, ["fp32", "bf16"], often=["ddp-fp32", "zero2-bf16", "zero3-fp32", "fsdp2-fp32"])
)
def test_every_rank_stops_in_the_same_step(ranks, engine, dtype):
    errors = ranks.errors(2, train_with_a_bad_batch, engine, variant(RUN, dtype=dtype))
    assert [kind for kind, _ in errors] == ["DivergenceError"] * 2
    for _, message in errors:
        assert "infinite or not a number in step 2; " in message  # DeepSpeed notices itself, and leaves the step out
