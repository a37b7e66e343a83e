"""start="importance" and outlier_limit in the Trainer: the first batches are seen, and the data come in their usual order."""

import pytest
import torch

from losia_dist import Drawn, Located, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from tests.support.cases import slow
from tests.support.models import tiny_llama
from tests.support.trainers import train_with_trainer
from tests.support.training import Run, global_batches, variant

CONFIG = {"rank_factor": 0.25, "period": 4, "selection": Located(start="importance", calibration_batches=2)}
RUN = Run(steps=6, config=CONFIG)


def first_subnets(trainer):
    return {layer.name: (layer.row_index.tolist(), layer.col_index.tolist()) for layer in trainer.losia.sites}


def located(run: Run, micro_batches):
    config = LoSiAConfig(**run.config)
    model = get_losia_model(tiny_llama(**run.model), config)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    losia.locate(micro_batches)
    return {layer.name: (layer.row_index.tolist(), layer.col_index.tolist()) for layer in losia.sites}


@pytest.mark.parametrize("engine", ["one", "ddp", slow("zero3"), "fsdp2"])
def test_subnets_are_located_from_the_first_batches_of_every_rank(ranks, tmp_path, engine):
    run = variant(RUN, steps=1)
    first = [step[0] for step in global_batches(variant(RUN, steps=2))]
    world = 1 if engine == "one" else 2
    # Each rank's micro-batch is a part of the global one, and counts for itself.
    parts = [{name: value.chunk(world)[rank] for name, value in batch.items()} for batch in first for rank in range(world)]
    expected = located(run, parts)
    results = (
        [train_with_trainer(str(tmp_path), engine, variant(RUN, steps=2), inspect=first_subnets)]
        if engine == "one"
        else ranks(2, train_with_trainer, str(tmp_path), engine, variant(RUN, steps=2), inspect=first_subnets)
    )
    for result in results:
        assert result["inspected"] == expected


def outliers(trainer):
    assert "losia/localizing" not in trainer.losia_callback.metrics()  # drawn: nothing localizes
    return trainer.losia.outliers


def test_outliers_of_the_first_batches_are_left_out(tmp_path):
    config = {"rank_factor": 0.25, "period": 2, "selection": Drawn(outlier_limit=1.3, calibration_batches=2)}
    run = variant(RUN, steps=2, config=config)
    model = get_losia_model(tiny_llama(**run.model), LoSiAConfig(**config))
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), LoSiAConfig(**config))
    losia.locate([step[0] for step in global_batches(run)])
    found = train_with_trainer(str(tmp_path), "one", run, inspect=outliers)["inspected"]
    assert found and found == losia.outliers


def test_the_data_come_in_the_same_order_with_and_without_calibration(tmp_path):
    seen = []
    for start in ("random", "importance"):
        # Whole weights train: where the subnets lie does not matter.
        config = {**CONFIG, "selection": Located(start=start, calibration_batches=2), "rank_factor": 1.0}
        run = variant(RUN, config=config)
        result = train_with_trainer(str(tmp_path / start), "one", run, train_sampling_strategy="random")
        seen.append(torch.tensor(result["losses"]))
    assert torch.equal(*seen)
