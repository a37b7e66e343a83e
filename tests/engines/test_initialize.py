"""`initialize`: what it refuses before any rank is spoken to, what ranks must agree on, and what its engine does."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from losia_dist import Located, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.sharding.deepspeed_config import read_deepspeed_config, refuse_unsupported
from tests.support.cases import slow
from tests.support.models import tiny_llama

CONFIG = LoSiAConfig(rank_factor=0.25, period=2)
BASE = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled.*bf16"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size.*re-localized"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "mics_shard_size.*removed"),
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
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}},
    ],
)
def test_the_same_features_turned_off_are_let_through(settings):
    refuse_unsupported({**BASE, **settings})


def test_an_optimizer_passed_and_one_in_the_configuration_is_an_error():
    model = get_losia_model(tiny_llama(), CONFIG)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3))
    with pytest.raises(ConfigError, match=r'LoSiAAdamW.*has an "optimizer" \(Adam\): remove one of the two'):
        initialize(model=model, losia_config=CONFIG, config={**BASE, "optimizer": {"type": "Adam"}}, optimizer=optimizer)


def test_a_scheduler_passed_and_one_in_the_configuration_is_an_error():
    settings = {**BASE, "scheduler": {"type": "WarmupLR", "params": {}}}
    with pytest.raises(ConfigError, match=r'has a "scheduler" \(WarmupLR\), which DeepSpeed would pass over'):
        initialize(model=tiny_llama(), losia_config=CONFIG, config=settings, lr_scheduler=lambda optimizer: None)


def test_a_configuration_file_that_is_missing_or_malformed_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="absent.json cannot be read"):
        initialize(model=tiny_llama(), losia_config=CONFIG, config=tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="bad.json is not valid JSON"):
        initialize(model=tiny_llama(), losia_config=CONFIG, config=tmp_path / "bad.json")


COMMENTED = """{
  # DeepSpeed reads its files as Hjson
  "train_micro_batch_size_per_gpu": 2, // so do we
  "bfloat16": {"enabled": "false"},
  "zero_optimization": {"stage": "3", "overlap_comm": "true", "offload_optimizer": {"device": "none",},},
}"""


def test_a_file_is_read_as_deepspeed_reads_it_and_brought_into_one_form(tmp_path):
    (tmp_path / "commented.json").write_text(COMMENTED)
    assert read_deepspeed_config(tmp_path / "commented.json") == {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "none"}},
    }
    given = {"zero_optimization": {"stage": "2"}}
    assert read_deepspeed_config(given) == {"zero_optimization": {"stage": 2}}
    assert given == {"zero_optimization": {"stage": "2"}}


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"bf16": {"enabled": true}, "bf16": {}}', 'file.json gives "bf16" twice: remove one'),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', 'gives "stage" twice'),
        ('{"zero_optimization": {"stage": 4}}', r'"stage": 4 .*0, 1, 2 and 3'),
        ('{"zero_optimization": {"stage": true}}', r'"stage": True .*0, 1, 2 and 3'),
        ('{"zero_optimization": {"stage": "two"}}', r'"stage": .two. .*0, 1, 2 and 3'),
        ('{"zero_optimization": true}', r'"zero_optimization": True .*an object is needed'),
        ('{"bf16": {}, "bfloat16": {}}', 'both "bf16" and "bfloat16"'),
        ('{"prescale_gradients": "false"}', r'"prescale_gradients": .false. .*leave out its quotes'),
        ("[1]", "must be a JSON object"),
        ("{'a': \xff", "is not valid JSON"),
    ],
)
def test_a_file_that_deepspeed_would_take_otherwise_than_it_is_meant_is_an_error(tmp_path, text, words):
    (tmp_path / "file.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        initialize(model=tiny_llama(), losia_config=CONFIG, config=tmp_path / "file.json")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gradient_acumulation_steps": 4}, r'"gradient_acumulation_steps".*did you mean "gradient_accumulation_steps"'),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, r'"data_types.grad_acum_dtype".*did you mean "grad_accum_dtype"'),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradient": True}},
            "(?s)DeepSpeed does not take.*round_robin_gradient",
        ),
        ({"bf16": {"enabled": "maybe"}}, "(?s)DeepSpeed does not take.*enabled"),
    ],
)
def test_keys_and_values_that_deepspeed_does_not_know_are_errors(settings, words):
    with pytest.raises(ConfigError, match=words):
        initialize(model=tiny_llama(), losia_config=CONFIG, config={**BASE, **settings})


def test_keys_that_nobody_reads_are_told_once_and_values_to_be_filled_in_are_let_through(caplog):
    own = {**BASE, "my_learning_rate_plan": "cosine", "gradient_clipping": "auto", "train_batch_size": "auto"}
    with caplog.at_level(logging.WARNING, logger="losia_dist"):
        refuse_unsupported(own)
        refuse_unsupported(own)
    assert [record.getMessage().count("my_learning_rate_plan") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"mpu": object()}, "mpu=.*no sequence groups"),
        ({"mesh_param": (1, 2)}, "mesh_param=.*sequence_parallel_size or mpu: leave it out"),
        ({"model_parameters": []}, "model_parameters=.*chosen by LoSiA"),
        ({"config_params": {}}, "config_params=.*pass config="),
        ({"args": SimpleNamespace(deepspeed_config="b.json")}, r"args.deepspeed_config \(b.json\) too"),
        ({"colate_fn": list}, "no argument 'colate_fn'"),
    ],
)
def test_arguments_that_do_not_reach_deepspeed_are_errors(arguments, words):
    with pytest.raises(ConfigError, match=words):
        initialize(model=tiny_llama(), losia_config=CONFIG, config=BASE, **arguments)


def train_with_leaf_modules(chosen: str, **config):
    """Llama's MLPs, attention or layers as ZeRO-3 leaf modules, by DeepSpeed's function."""
    from deepspeed.utils import set_z3_leaf_modules
    from transformers.models.llama import modeling_llama

    from tests.support.training import Run, train

    def prepare(model):
        set_z3_leaf_modules(model, [getattr(modeling_llama, chosen)])
        if config.get("inputs_need_gradients"):
            model.enable_input_require_grads()

    return train("zero3", Run(steps=2, config={"rank_factor": 0.25, "period": 1}), prepare=prepare)["losses"]


@pytest.mark.parametrize("chosen, inputs_need_gradients", [("LlamaAttention", True), slow("LlamaDecoderLayer", False)])
def test_leaf_modules_that_would_die_in_their_first_backward_are_refused(ranks, chosen, inputs_need_gradients):
    errors = ranks.errors(2, train_with_leaf_modules, chosen, inputs_need_gradients=inputs_need_gradients)
    for kind, message in errors:
        assert kind == "UnsupportedError"
        assert f"({chosen}) is a ZeRO-3 leaf module with subnets, and no positional input of it needs a gradient" in message


def test_a_decoder_layer_whose_inputs_need_a_gradient_may_be_a_leaf_module(ranks):
    plain = ranks(2, train_with_leaf_modules, "LlamaRotaryEmbedding")
    assert ranks(2, train_with_leaf_modules, "LlamaDecoderLayer", inputs_need_gradients=True) == plain


def start_with_another_period(stage):
    config = LoSiAConfig(rank_factor=0.25, period=2 + dist.get_rank())
    initialize(model=tiny_llama(), losia_config=config, config={**BASE, "zero_optimization": {"stage": stage}})


def start_with_another_batch():
    batch = {"train_micro_batch_size_per_gpu": 1 + dist.get_rank()}
    initialize(model=tiny_llama(), losia_config=CONFIG, config={**BASE, **batch})


def start_ddp_with_another_configuration():
    from torch.nn.parallel import DistributedDataParallel

    from losia_dist import LoSiA

    config = LoSiAConfig(rank_factor=0.25, selection=Located(("param_mix", "first_order")[dist.get_rank()]))
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
