"""`Located(share_columns=True)` against the dense reference: layers with one input located together, on one set of columns."""

import pytest
import torch

from losia_dist import Located, load_checkpoint
from losia_dist.errors import CheckpointError, ConfigError
from tests.support import resume as runs
from tests.support.cases import grid, slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

SHARED = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "selection": Located(share_columns=True), "seed": 5}
RUN = Run(steps=10, accumulation=2, max_grad_norm=0.5, config=SHARED)


def with_config(run=RUN, **changes):
    return variant(run, config={**run.config, **changes})


def located(run=RUN, **options):
    return with_config(run, selection=Located(share_columns=True, **options))


VARIANTS = {
    "two layers a slot": with_config(layers_per_slot=2),
    "all rows": with_config(rank_factor=(1.0, 0.25)),
    # q and v share, k and o have another number of columns; up keeps all rows and gate does not; down keeps all columns.
    "unlike sizes": with_config(
        rank_pattern={
            "q_proj": (0.1, 0.25),
            "k_proj": (0.25, 0.5),
            "o_proj": (0.25, 0.5),
            "up_proj": (1.0, 0.25),
            "down_proj": (0.25, 1.0),
        }
    ),
    "some are no targets": with_config(target_modules=["q_proj", "v_proj", "up_proj"]),
    "importance of one step": located(importance_steps=1),
    "first subnets by importance": located(
        variant(RUN, calibration=4, model={"tie_word_embeddings": True}), start="importance"
    ),
    "each rank groups of its own": located(reduction="by_rank"),
    "mixture of experts": with_config(variant(RUN, family="mixture:deepseek_v3"), layers_per_slot=2),
}
OFTEN = [f"{name}-one" for name in VARIANTS]
OFTEN += ["two layers a slot-ddp", "two layers a slot-fsdp2"]
OFTEN += ["unlike sizes-fsdp2", "first subnets by importance-ddp", "each rank groups of its own-ddp", "mixture of experts-ddp"]


@pytest.mark.parametrize("run, engine", grid(VARIANTS, ["one", "ddp", "zero3", "fsdp2"], often=OFTEN))
def test_layers_that_share_columns_equal_the_reference(ranks, run, engine):
    expected = reference(run, ranks=1 if engine == "one" else 2)
    for result in [train(engine, run)] if engine == "one" else ranks(2, train, engine, run):
        for name, places in expected["first"].items():
            assert [found.tolist() for found in result["first"][name]] == [wanted.tolist() for wanted in places], name
        assert_same_run(result, expected)


def columns(chosen, layer):
    """Of the linear layers of one decoder layer, by their last names."""
    found = {name.split(".")[-2]: places[1].tolist() for name, places in chosen.items() if f"layers.{layer}." in name}
    return lambda *names: [found[f"{name}_proj"] for name in names]


def test_they_share_at_the_start_and_after_each_move_and_other_layers_do_not():
    result = train("one", with_config(layers_per_slot=4))
    for chosen in (result["first"], *(chosen for _, name, chosen in result["history"] if name == "model.layers.1")):
        of = columns(chosen, 1)
        (q, k, v), (gate, up) = of("q", "k", "v"), of("gate", "up")
        assert q == k == v != gate == up
    assert of("q") != of("o")  # of one module and width, but of another input
    apart = train("one", with_config(layers_per_slot=4, selection=Located()))
    for chosen in (apart["first"], *(chosen for _, name, chosen in apart["history"] if name == "model.layers.1")):
        q, k, v = columns(chosen, 1)("q", "k", "v")
        assert q != k != v


def test_layers_of_unlike_sizes_share_with_those_of_their_own():
    history = train("one", VARIANTS["unlike sizes"])["history"]
    q, k, v, o, gate, up = columns(history[0][2], 0)("q", "k", "v", "o", "gate", "up")
    assert q == v and len(k) > len(q) and gate == up
    assert k != o  # alike in size, but of other inputs


# In the first slot k's weight is zero, and so is q's gradient; in the third one all gradients are.
QUIET = Run(
    steps=5,
    config={**SHARED, "period": 1},
    quiet=((2, 0),),
    silenced="model.layers.0.self_attn.k_proj.weight",
)


@pytest.mark.parametrize("engine", ["one", "ddp", slow("zero3"), slow("fsdp2")])
def test_without_signal_rows_stay_and_columns_only_where_none_has_any(ranks, engine):
    expected = reference(QUIET)
    results = [train(engine, QUIET)] if engine == "one" else ranks(2, train, engine, QUIET)
    for result in results:
        assert_same_run(result, expected)
    first, (here, _, there, *_) = results[0]["first"], [chosen for _, _, chosen in results[0]["history"]]
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    for name, rows_stay in ((q, True), (k, True), (v, False)):
        assert torch.equal(here[name][0], first[name][0]) is rows_stay
        assert torch.equal(here[name][1], here[v][1]) and not torch.equal(here[name][1], first[name][1])
    for name, places in there.items():
        assert all(torch.equal(one, other) for one, other in zip(places, first[name], strict=True)), name


CELLS = ["one", "ddp", slow("zero2"), slow("zero3"), "fsdp2"]


@pytest.mark.parametrize("engine", CELLS)
def test_a_resumed_run_goes_on_as_the_undisturbed_one(ranks, tmp_path, engine):
    """From within a slot, whose averages are kept."""
    run = with_config(period=3)
    if engine == "one":
        undisturbed = runs.train_and_save("one", run, tmp_path, (5,))
        runs.assert_equal(runs.resume("one", run, tmp_path, None), undisturbed)
        return
    undisturbed = ranks(2, runs.train_and_save, engine, run, tmp_path, (5,))
    for ours, theirs in zip(ranks(2, runs.resume, engine, run, tmp_path, None), undisturbed, strict=True):
        assert ours["first"] == 5
        runs.assert_equal(ours, theirs)


def test_a_checkpoint_that_knows_of_no_shared_columns_goes_on_without_them(tmp_path, monkeypatch):
    own = with_config(selection=Located())
    with runs.saving_without(monkeypatch, "located", "share_columns"):
        undisturbed = runs.train_and_save("one", own, tmp_path, (5,))
    losia, _, close = runs.start("one", RUN)
    with pytest.raises(CheckpointError, match="was saved with share_columns=False, and this run has share_columns=True"):
        load_checkpoint(tmp_path, **runs.parts(losia))
    close()
    runs.assert_equal(runs.resume("one", own, tmp_path, None), undisturbed)


def test_a_value_that_is_no_truth_value_is_refused():
    with pytest.raises(ConfigError, match=r"selection: located: share_columns=1: true or false is needed"):
        Located(share_columns=1)
