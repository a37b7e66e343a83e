"""`initialize`: what it refuses before any rank is spoken to, what ranks must agree on, and what its engine does."""

import json
import logging

import pytest
import torch
import torch.distributed as dist

from losia_dist import LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.sharding.deepspeed_config import refuse_unsupported
from tests.support.models import tiny_llama

CONFIG = LoSiAConfig(rank_factor=0.25, period=2)
BASE = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled.*bf16"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size.*re-localized"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "mics_shard_size.*ZeRO-3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device.*CPU"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size.*ZeRO-3"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.*bf16"),
    ],
)
def test_deepspeed_features_that_do_not_work_are_refused_with_the_fix(settings, words):
    with pytest.raises(UnsupportedError, match=words):
        initialize(model=tiny_llama(), losia_config=CONFIG, config={**BASE, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": {"enabled": False}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "mics_shard_size": -1}},
    ],
)
def test_the_same_features_turned_off_are_let_through(settings):
    refuse_unsupported({**BASE, **settings})


def test_an_optimizer_passed_and_one_in_the_configuration_is_an_error():
    model = get_losia_model(tiny_llama(), CONFIG)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3))
    with pytest.raises(ConfigError, match=r'LoSiAAdamW.*has an "optimizer" \(Adam\): remove one of the two'):
        initialize(model=model, losia_config=CONFIG, config={**BASE, "optimizer": {"type": "Adam"}}, optimizer=optimizer)


def test_a_configuration_file_that_is_missing_or_malformed_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="absent.json cannot be read"):
        initialize(model=tiny_llama(), losia_config=CONFIG, config=tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="bad.json is not valid JSON"):
        initialize(model=tiny_llama(), losia_config=CONFIG, config=tmp_path / "bad.json")


def start_with_another_period(stage):
    config = LoSiAConfig(rank_factor=0.25, period=2 + dist.get_rank())
    initialize(model=tiny_llama(), losia_config=config, config={**BASE, "zero_optimization": {"stage": stage}})


def start_with_another_batch():
    batch = {"train_micro_batch_size_per_gpu": 1 + dist.get_rank()}
    initialize(model=tiny_llama(), losia_config=CONFIG, config={**BASE, **batch})


def start_ddp_with_another_configuration():
    from torch.nn.parallel import DistributedDataParallel

    from losia_dist import LoSiA

    config = LoSiAConfig(rank_factor=0.25, importance=("param_mix", "first_order")[dist.get_rank()])
    model = DistributedDataParallel(get_losia_model(tiny_llama(), config))
    LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3)), config)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_with_different_configurations_all_stop_with_both_values(ranks, stage):
    for kind, message in ranks.errors(2, start_with_another_period, stage):
        assert kind == "ConfigError"
        assert "period is 2 on rank 0 and 3 on rank 1" in message


def test_ranks_with_different_deepspeed_settings_all_stop(ranks):
    for _, message in ranks.errors(2, start_with_another_batch):
        assert "train_micro_batch_size_per_gpu is 1 on rank 0 and 2 on rank 1" in message


def test_ddp_ranks_with_different_configurations_all_stop(ranks):
    for _, message in ranks.errors(2, start_ddp_with_another_configuration):
        assert "importance is 'param_mix' on rank 0 and 'first_order' on rank 1" in message


def diverge(engine_name: str):
    """Rank 1's data is fine, but its score is tampered with just before selection."""
    from tests.support.training import Run, train

    def inspect(stage, losia, engine):
        if stage == "before" and losia.steps == 1 and dist.get_rank() == 1:
            gather = losia.collectives.gather_rows
            losia.collectives.gather_rows = lambda values, size: torch.rand_like(gather(values, size))

    train(engine_name, Run(steps=4, config={"rank_factor": 0.25, "period": 2}), inspect)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_ranks_that_choose_different_subnets_all_stop_with_rank_and_layer(ranks, engine):
    for kind, message in ranks.errors(2, diverge, engine):
        assert kind == "DivergenceError"
        assert "rank 1: chosen places of model.layers.0" in message


def use_engine():
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 97, (8, 6))]
    engine, optimizer, loader, scheduler = initialize(
        model=tiny_llama(),
        losia_config=CONFIG,
        config=BASE,
        lr=1e-3,
        training_data=data,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o),
    )
    for batch in loader:
        engine.backward(engine(**batch).loss)
        engine.step()
    result = (engine.losia.steps, engine.losia.localizing, type(optimizer).__name__, type(scheduler).__name__)
    engine.losia.detach()
    engine.destroy()
    return result


def test_the_four_tuple_works_and_the_engines_own_step_drives_the_slots(ranks):
    for steps, localizing, optimizer, scheduler in ranks(2, use_engine):
        assert (steps, localizing) == (2, ["model.layers.1"])  # 8 examples, 2 ranks, micro-batch 2; period 2
        assert (optimizer, scheduler) == ("DeepSpeedZeroOptimizer", "ConstantLR")


def test_the_configuration_that_was_passed_is_not_changed(ranks):
    before = json.dumps(BASE)
    with pytest.raises(UnsupportedError):
        initialize(model=tiny_llama(), losia_config=CONFIG, config={**BASE, "fp16": {"enabled": True}})
    assert json.dumps(BASE) == before


def decay_of_named_optimizer():
    named = {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.1, "torch_adam": True}}
    engine, optimizer, _, _ = initialize(model=tiny_llama(), losia_config=CONFIG, config={**BASE, "optimizer": named})
    settings = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    engine.losia.detach()
    engine.destroy()
    return settings


def test_an_optimizer_named_in_the_configuration_keeps_its_learning_rate_and_weight_decay(ranks):
    assert ranks(2, decay_of_named_optimizer) == [{(2e-3, 0.1)}] * 2
