"""Interrupted between two micro-batches or during an evaluation: the checkpoint before it resumes to the undisturbed run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from losia_dist import load_checkpoint, save_checkpoint
from losia_dist.errors import CheckpointError
from tests.support import resume as runs
from tests.support.cases import grid

RUN = replace(runs.RUN, steps=10, accumulation=2, config={**runs.RUN.config, "period": 3})
SAVED = 5  # inside a slot; the layer of the slot before rewarms


def batch_of(step: int) -> dict[str, torch.Tensor]:
    whole = runs.global_batches(RUN)[step][0]
    return {name: tensor.chunk(dist.get_world_size())[dist.get_rank()] for name, tensor in whole.items()}


def interrupted(engine: str, directory: Path, moment: str) -> None:
    """Train to the checkpoint and one step beyond it, and end in the middle of what comes then."""
    losia, stepper, close = runs.start(engine, RUN)
    runs.train_on(losia, stepper, RUN, SAVED, lambda done: done == SAVED and save_checkpoint(directory, **runs.parts(losia)))
    runs.train_on(losia, stepper, RUN, SAVED + 1)
    model = losia.model
    if moment == "evaluation":
        model.eval()
        with torch.no_grad():
            model(**batch_of(0), use_cache=False)
    else:
        model(**batch_of(SAVED + 1), use_cache=False).loss.backward()
        assert losia.in_mid_step
        for call in (save_checkpoint, load_checkpoint):  # neither mixes half a step with whole ones
            with pytest.raises(CheckpointError, match="in the middle of an optimizer step"):
                call(directory, **runs.parts(losia))
    close()


ENGINES, MOMENTS = ("ddp", "zero2", "zero3", "fsdp2"), ("accumulation", "evaluation")


@pytest.mark.parametrize("engine, moment", grid(ENGINES, MOMENTS, often=["ddp-accumulation"]))
def test_a_run_that_ended_there_goes_on_from_its_checkpoint_bit_for_bit(ranks, tmp_path, engine, moment):
    undisturbed = ranks(2, runs.train_and_save, engine, RUN, None, ())
    ranks(2, interrupted, engine, tmp_path, moment)
    for ours, theirs in zip(ranks(2, runs.resume, engine, RUN, tmp_path, None), undisturbed, strict=True):
        assert ours["first"] == SAVED
        runs.assert_equal(ours, theirs)


def go_back_in_the_same_process(directory: Path) -> tuple[dict, dict]:
    """In mid accumulation, forget the half step and load: what the message of the refusal says."""
    undisturbed = runs.train_and_save("one", RUN, directory, (SAVED,))
    losia, stepper, close = runs.start("one", RUN, other_weights=True)
    runs.train_on(losia, stepper, RUN, 2)
    losia.model(**runs.global_batches(RUN)[0][0], use_cache=False).loss.backward()
    with pytest.raises(CheckpointError, match=r"optimizer.zero_grad\(\) and losia.discard_step\(\)"):
        load_checkpoint(directory, **runs.parts(losia))
    losia.state.optimizer.zero_grad()
    losia.discard_step()
    load_checkpoint(directory, **runs.parts(losia))
    losses = runs.train_on(losia, stepper, RUN, RUN.steps)
    result = {"losses": losses, "everything": runs.everything(losia), "first": SAVED}
    close()
    return result, undisturbed


def test_loading_into_a_run_in_mid_accumulation_needs_the_half_step_forgotten(tmp_path):
    runs.assert_equal(*go_back_in_the_same_process(tmp_path))
