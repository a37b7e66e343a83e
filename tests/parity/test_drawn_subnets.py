"""selection="random": subnets drawn anew, against the dense reference; the same ones everywhere, with nothing sent for them."""

import pytest
import torch

from losia_dist import Drawn, LoSiAConfig, load_checkpoint, save_checkpoint
from losia_dist.errors import CheckpointError, ConfigError
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

DRAWN = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "selection": "random", "seed": 5}
RUN = Run(steps=10, accumulation=2, max_grad_norm=0.5, config=DRAWN)


@pytest.mark.parametrize("engine", ["one", "ddp", slow("zero2"), "zero3", slow("fsdp2")])
def test_drawn_subnets_equal_the_reference(ranks, engine):
    expected = reference(RUN)
    for result in [train(engine, RUN)] if engine == "one" else ranks(2, train, engine, RUN):
        assert_same_run(result, expected)


LIMIT = 1.3  # the tiny model's inputs are all alike: about one in ten is above
LIMITED = variant(RUN, calibration=4, config={**DRAWN, "selection": Drawn(outlier_limit=LIMIT)})


@pytest.mark.parametrize("engine", ["one", slow("ddp"), "zero2", slow("zero3"), "fsdp2"])
def test_input_neurons_that_stand_out_are_never_drawn(ranks, engine):
    expected = reference(LIMITED)
    for result in [train(engine, LIMITED)] if engine == "one" else ranks(2, train, engine, LIMITED):
        for name, places in expected["first"].items():
            assert [found.tolist() for found in result["first"][name]] == [wanted.tolist() for wanted in places], name
        assert_same_run(result, expected)


def left_out(run: Run = LIMITED) -> tuple[dict[str, list[int]], set[tuple[str, int]]]:
    """What a run leaves out, and all (layer, column) that ever trained."""
    trained: set[tuple[str, int]] = set()
    found: dict[str, list[int]] = {}

    def inspect(stage, losia, _):
        found.update(losia.outliers)
        trained.update((layer.name, column) for layer in losia.sites for column in layer.col_index.tolist())

    train("one", run, inspect)
    return found, trained


def test_some_stand_out_and_no_later_subnet_takes_them():
    outliers, trained = left_out()
    assert outliers and all(outliers.values())
    assert not {(name, column) for name, columns in outliers.items() for column in columns} & trained
    _, without = left_out(variant(RUN))
    assert {(name, column) for name, columns in outliers.items() for column in columns} & without


def test_the_input_neurons_of_a_transposed_weight_are_told_from_its_outputs():
    def make_one_loud(model):
        model.get_submodule("transformer.h.1.ln_1").weight.data[3] = 100.0

    found = {}

    def inspect(stage, losia, _):
        found.update(losia.outliers)
        layer = next(layer for layer in losia.sites if layer.name == "transformer.h.1.attn.c_attn")
        assert layer.weight_is_transposed and 3 not in layer.col_index

    config = {**DRAWN, "rank_factor": [1.0, 0.5], "selection": Drawn(outlier_limit=20)}
    train("one", variant(LIMITED, family="gpt2", model={}, config=config), inspect, make_one_loud)
    assert found == {"transformer.h.1.attn.c_attn": [3]}


def test_a_subnet_of_all_columns_keeps_those_that_stand_out():
    pattern = {"rank_pattern": {"down_proj": [0.25, 1.0]}}
    outliers, trained = left_out(variant(LIMITED, config={**LIMITED.config, **pattern}))
    assert outliers and not any("down_proj" in name for name in outliers)
    assert {column for name, column in trained if name == "model.layers.0.mlp.down_proj"} == set(range(77))


def test_drawn_subnets_need_no_rewarming():
    run = variant(RUN, config={**DRAWN, "rewarm_steps": 0})
    assert_same_run(train("one", run), reference(run))


def test_every_draw_is_another_and_another_seed_draws_others():
    history = reference(RUN)["history"]
    of_layer = [chosen[name] for _, _, chosen in history for name in chosen if "layers.0.mlp.down_proj" in name]
    drawn = [rows.tolist() for rows, _ in of_layer]
    assert len(drawn) > 1 and len({tuple(rows) for rows in drawn}) == len(drawn)
    other = reference(variant(RUN, config={**DRAWN, "seed": 6}))["history"]
    name = next(name for name in history[0][2] if "down_proj" in name)
    assert history[0][2][name][0].tolist() != other[0][2][name][0].tolist()


def watch(engine: str) -> dict[str, int]:
    """How many layers collected importance or formed a full gradient in any step, and what was measured of the moves."""
    collecting, captured = [], []

    def inspect(stage, losia, _):
        collecting.append(len(losia.accumulators) + sum(layer.gradient_sink is not None for layer in losia.sites))
        if not losia.on_move:
            losia.on_move.append(lambda move: captured.append(move.captured))

    train(engine, RUN, inspect)
    return {"collecting": max(collecting), "moves": len(captured), "measured": sum(c is not None for c in captured)}


def test_no_importance_is_collected_and_none_is_reported(ranks):
    for found in ranks(2, watch, "ddp"):
        assert found["collecting"] == found["measured"] == 0
        assert found["moves"] > 0


def save_in_mid_step(directory) -> None:
    losia, stepper, close = runs.start("one", RUN)
    runs.train_on(losia, stepper, RUN, 2)
    losia.model(**runs.global_batches(RUN)[0][0], use_cache=False).loss.backward()
    with pytest.raises(CheckpointError, match="in the middle of an optimizer step"):
        save_checkpoint(directory, **runs.parts(losia))
    with pytest.raises(CheckpointError, match="in the middle of an optimizer step"):
        load_checkpoint(directory, **runs.parts(losia))
    losia.discard_step()
    save_checkpoint(directory, **runs.parts(losia))
    close()


def test_half_a_step_is_not_saved_though_nothing_collects_importance(tmp_path):
    save_in_mid_step(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_resumed_run_draws_what_the_undisturbed_one_draws(ranks, tmp_path, engine):
    undisturbed = ranks(2, runs.train_and_save, engine, RUN, tmp_path, (5,))
    for ours, theirs in zip(ranks(2, runs.resume, engine, RUN, tmp_path, None), undisturbed, strict=True):
        assert ours["first"] == 5
        runs.assert_equal(ours, theirs)


def test_a_resumed_run_leaves_out_what_the_undisturbed_one_does(ranks, tmp_path):
    undisturbed = ranks(2, runs.train_and_save, "zero2", LIMITED, tmp_path, (5,))
    for ours, theirs in zip(ranks(2, runs.resume, "zero2", LIMITED, tmp_path, None), undisturbed, strict=True):
        assert ours["first"] == 5
        runs.assert_equal(ours, theirs)


def test_another_seed_is_refused_on_resume(tmp_path):
    runs.train_and_save("one", RUN, tmp_path, (5,))
    losia, _, close = runs.start("one", variant(RUN, config={**DRAWN, "seed": 6}))
    with pytest.raises(CheckpointError, match="seed"):
        load_checkpoint(tmp_path, **runs.parts(losia))
    close()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"selection": {"drawn": {"outlier_limit": 1}}}, "outlier_limit=1: a number above 1"),
        ({"selection": {"drawn": {"outlier_limit": "4"}}}, "outlier_limit='4': a number above 1"),
        ({"rank_factor": (0.25, 1.0), "selection": Drawn(outlier_limit=4)}, "outlier_limit=4, but subnets take all columns"),
    ],
)
def test_outlier_limits_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        LoSiAConfig(**options)


def test_a_limit_that_leaves_too_few_names_the_layer():
    with pytest.raises(ConfigError, match=r"outlier_limit=1.0001: \d+ of 36 input neurons of model\.layers\.0.* takes 32"):
        train("one", variant(LIMITED, config={**DRAWN, "rank_factor": (0.25, 0.9), "selection": Drawn(outlier_limit=1.0001)}))


def test_a_step_before_the_calibration_batches_is_refused():
    with pytest.raises(ConfigError, match=r"outlier_limit=1.3, but no calibration batches.*losia.locate\(batches\)"):
        train("one", variant(LIMITED, calibration=0))


def test_locating_is_refused():
    def ask(stage, losia, _):
        with pytest.raises(ConfigError, match=r"Drawn\(\) draws subnets and locates none"):
            losia.locate([{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}])

    train("one", variant(RUN, steps=1), ask)
