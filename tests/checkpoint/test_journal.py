"""What a run notes between two saves is bounded however long it does not save, and the save after that is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from losia_dist import load_checkpoint, save_checkpoint
from losia_dist.checkpoint import layout
from losia_dist.checkpoint.journal import Moved, read_blocks
from losia_dist.checkpoint.session import session_of
from tests.support import resume as runs
from tests.support.cases import slow

# One decoder layer and the head, by turns, every step: each moves 20 times without a save, and 16 subnets are a weight.
ONE_LAYER = {"num_hidden_layers": 1}
RUN = replace(runs.RUN, steps=46, config={**runs.RUN.config, "period": 1}, model=ONE_LAYER)
CONV1D = replace(RUN, family="gpt2", model={"n_layer": 1}, config={"rank_factor": 0.25, "period": 1})
SHORT = {"steps": 10, "config": {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 1}}


def noted_bytes(losia) -> int:
    chains = session_of(losia).chains
    places = [index for chain in chains.values() for _, *pair in chain.pending for index in pair if index is not None]
    return sum(index.numel() * index.element_size() for index in places)


def train_without_saving(engine: str, run: runs.Run, directory: Path, first: int, last: int) -> dict:
    """Resume at `first`, save at `last` and not in between; what is noted after every step."""
    losia, stepper, close = runs.start(engine, run, other_weights=True)
    load_checkpoint(directory, **runs.parts(losia), step=first)
    noted = []
    runs.train_on(losia, stepper, run, last, lambda done: noted.append(noted_bytes(losia)))
    save_checkpoint(directory, **runs.parts(losia))
    weights = sum(layer.weight.numel() * layer.weight.element_size() for layer in losia.sites)
    result = {"noted": noted, "after": noted_bytes(losia), "weights": weights}
    close()
    return result


@pytest.mark.parametrize("run", [RUN, replace(RUN, dtype="bf16"), CONV1D], ids=["fp32", "bf16", "conv1d"])
def test_a_run_that_rarely_saves_holds_places_only_and_resumes_exactly(tmp_path, run):
    undisturbed = runs.train_and_save("one", run, tmp_path, (2,))
    found = train_without_saving("one", run, tmp_path, 2, 44)
    assert found["noted"][-1] == 0  # every weight has become a whole one
    assert max(found["noted"]) < found["weights"] / 2 and found["after"] == 0
    assert found["noted"][3] > 0
    runs.assert_equal(runs.resume("one", run, tmp_path, 44), undisturbed)


@pytest.mark.parametrize("engine", ["ddp", slow("zero3"), slow("fsdp2")])
def test_sharded_weights_give_what_moved_subnets_left_in_them(ranks, tmp_path, engine):
    """Few moves and many: single places, and weights that became whole (one rank's share of each)."""
    run = replace(RUN, steps=40)
    undisturbed = ranks(2, runs.train_and_save, engine, run, tmp_path, (2,))
    ranks(2, train_without_saving, engine, run, tmp_path, 2, 7)
    ranks(2, train_without_saving, engine, run, tmp_path, 7, 39)
    for ours, theirs in zip(ranks(2, runs.resume, engine, run, tmp_path, 39), undisturbed, strict=True):
        runs.assert_equal(ours, theirs)
    files = [layout.read_manifest(tmp_path / layout.step_name(step))["journal"] for step in (2, 7, 39)]
    assert [len(listed) for listed in files] == [0, 2, 4]  # both ranks write


def test_places_become_a_whole_weight_once_they_are_as_large(tmp_path):
    losia, _, close = runs.start("one", replace(RUN, **SHORT))
    layer = losia.sites[0]
    moved, other = Moved(), Moved()
    for _ in range(3):
        moved.add(layer)
    assert [r.tolist() for _, r, _ in moved] == [layer.row_index.tolist()] * 3
    while list(moved) != [(layer, None, None)]:
        assert len(list(moved)) * layer.subnet_size < layer.size
        moved.add(layer)
    moved.add(layer)
    other.add(layer)
    other.add(losia.sites[1])
    other.update(moved)
    assert [(place[0], place[1] is None) for place in other] == [(layer, True), (losia.sites[1], False)]
    block = {name.rpartition("/")[2]: tensor for name, tensor in read_blocks(moved, losia.parameters, 0, 1).items()}
    assert torch.equal(block["values"], layer.weight) and block["rows"].tolist() == list(range(layer.weight.shape[0]))
    close()
