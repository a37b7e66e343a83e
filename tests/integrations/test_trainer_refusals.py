"""What LoSiATrainer refuses at start: one error, the same on every rank, that names the value and the fix."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import TrainingArguments

from losia_dist import LoSiAAdamW, LoSiACallback, LoSiAConfig, LoSiATrainer, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, LoSiAError, UnsupportedError
from losia_dist.integrations.trainer.refusals import refuse_arguments, refuse_engine
from tests.support.models import tiny_llama
from tests.support.trainers import TrainerOnCPU, arguments, examples, fresh_accelerate, train_with_trainer
from tests.support.training import Run

CONFIG = LoSiAConfig(rank_factor=0.25)
RUN = Run(steps=2)


def marked(attributes):
    """A model that says of itself what only other libraries could make."""
    model = tiny_llama()
    model.__class__ = type("Marked", (type(model),), attributes)
    return model


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"optim": "adafactor"}, UnsupportedError, "optim='adafactor'.*optim='adamw_torch'.*losia_parameter_groups"),
        ({"optim": "adamw_8bit"}, UnsupportedError, "optim='adamw_8bit'"),
        ({"optim_args": "foo=1"}, UnsupportedError, "optim_args='foo=1'.*adam_beta1"),
        ({"auto_find_batch_size": True}, UnsupportedError, "auto_find_batch_size=True.*set per_device_train_batch_size"),
        ({"save_on_each_node": True}, UnsupportedError, "save_on_each_node=True.*shared output_dir"),
        ({"torch_compile": True}, UnsupportedError, "torch_compile=True.*remove it"),
    ],
)
def test_training_arguments(tmp_path, changes, error, words):
    with fresh_accelerate(), pytest.raises(error, match=words):
        LoSiATrainer(tiny_llama(), arguments(str(tmp_path), RUN, **changes), train_dataset=[], losia_config=CONFIG)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"losia_config": {"period": 2}}, ConfigError, "a LoSiAConfig is needed"),
        ({"model": None, "model_init": tiny_llama}, UnsupportedError, "model_init.*pass model"),
        ({"marks": {"peft_config": {"default": 1}}}, UnsupportedError, "PEFT adapter.*merge_and_unload"),
        ({"marks": {"_hf_peft_config_loaded": True}}, UnsupportedError, "PEFT adapter"),
        ({"marks": {"is_distributed_loading_by_transformers": True}}, UnsupportedError, "distributed_config.*FSDP2"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, UnsupportedError, "pass optimizers="),
        ({"callbacks": [LoSiACallback(CONFIG)]}, ConfigError, "adds LoSiACallback itself"),
    ],
)
def test_other_arguments_of_the_trainer(tmp_path, changes, error, words):
    with fresh_accelerate(), pytest.raises(error, match=words):
        changes = dict(changes)
        defaults = {"model": marked(changes.pop("marks", {})), "args": arguments(str(tmp_path), RUN), "losia_config": CONFIG}
        LoSiATrainer(**{**defaults, **changes}, train_dataset=examples(RUN))


def engine(**changes):
    """What `refuse_engine` looks at, in a state that it lets through but for the changes ("a.b" sets an inner value)."""
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False, activation_checkpointing=False)
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=SimpleNamespace(backend="NO"))
    parallelism = SimpleNamespace(tp_size=1, cp_size=1, sp_size=1)
    accelerator = SimpleNamespace(
        mixed_precision="bf16",
        state=state,
        parallelism_config=parallelism,
        num_processes=2,
        distributed_type=SimpleNamespace(value="FSDP"),
    )
    args = SimpleNamespace(n_gpu=1, fsdp=True)
    trainer = SimpleNamespace(accelerator=accelerator, args=args, is_model_parallel=False, is_deepspeed_enabled=False)
    for path, value in changes.items():
        *holders, name = path.split("__")
        target = trainer
        for holder in holders:
            target = getattr(target, holder)
        setattr(target, name, value)
    return trainer


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"accelerator__mixed_precision": "fp16"}, "mixed precision 'fp16'.*bf16"),
        ({"args__n_gpu": 4}, "4 GPUs in one process.*torchrun"),
        ({"is_model_parallel": True}, "device_map.*FSDP2 or ZeRO-3"),
        ({"accelerator__state__dynamo_plugin__backend": "INDUCTOR"}, "torch.compile.*remove it"),
        ({"accelerator__parallelism_config__tp_size": 2}, "tp_size=2"),
        ({"accelerator__parallelism_config__cp_size": 2}, "cp_size=2"),
        ({"accelerator__state__fsdp_plugin__fsdp_version": 1}, "FSDP1 is not supported.*'version': 2"),
        ({"accelerator__state__fsdp_plugin__cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading.*set it to false"),
        ({"accelerator__state__fsdp_plugin__activation_checkpointing": True}, "gradient_checkpointing=True instead"),
        ({"accelerator__state__fsdp_plugin": None}, "fsdp was asked for, but Accelerate gave FSDP"),
    ],
)
def test_engines_that_only_other_machines_have(changes, words):
    refuse_engine(engine())
    with pytest.raises(UnsupportedError, match=words):
        refuse_engine(engine(**changes))


def test_fp16_is_refused_before_the_trainer_is_made(tmp_path):
    args = arguments(str(tmp_path), RUN)
    args.fp16 = True
    with fresh_accelerate(), pytest.raises(UnsupportedError, match="fp16=True.*use bf16=True, or fp32"):
        LoSiATrainer(tiny_llama(), args, train_dataset=[], losia_config=CONFIG)


def make(directory: str, name: str, changes: dict, optimizer: bool = False, period_by_rank: bool = False):
    """A trainer that must be refused on every rank."""
    with fresh_accelerate():
        args = arguments(directory, RUN, name, **changes)
        config = LoSiAConfig(rank_factor=0.25, period=5 + period_by_rank * dist.get_rank())
        model, optimizers = tiny_llama(), (None, None)
        if optimizer:
            optimizers = (LoSiAAdamW(losia_parameter_groups(get_losia_model(model, config), lr=1e-3)), None)
        trainer_class = LoSiATrainer if name == "dropped" else TrainerOnCPU
        trainer_class(model, args, train_dataset=examples(RUN), losia_config=config, optimizers=optimizers)


FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
ZERO = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("dropped", {"changes": FSDP}, "fsdp was asked for, but Accelerate gave MULTI_CPU on 2 processes.*take fsdp out"),
        ("fsdp1", {"changes": {"fsdp": True, "fsdp_config": {"version": 1}}}, "FSDP1 is not supported"),
        ("zero", {"changes": {"deepspeed": {**ZERO, "torch_autocast": {"enabled": True}}}}, "torch_autocast.*bf16"),
        ("zero", {"changes": {"deepspeed": ZERO}, "optimizer": True}, 'not used by the Trainer under DeepSpeed.*"optimizer"'),
        ("ddp", {"changes": {}, "period_by_rank": True}, "period is 5 on rank 0 and 6 on rank 1"),
    ],
)
def test_on_two_ranks_all_stop_with_the_same_message(ranks, tmp_path, name, settings, words):
    import re

    failures = ranks.errors(2, make, str(tmp_path), "ddp" if name == "zero" else name, **settings)
    for kind, message in failures:
        assert kind in ("UnsupportedError", "ConfigError")
        assert re.search(words, message), message


def test_a_key_given_twice_of_which_transformers_takes_the_last_is_refused(tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}')
    args = SimpleNamespace(deepspeed=str(tmp_path / "zero.json"))
    with pytest.raises(ConfigError, match='zero.json gives "zero_optimization" twice'):
        refuse_arguments(LoSiATrainer, {"model": tiny_llama(), "args": args}, CONFIG)


def train_with_the_stage_as_text(directory: str):
    zero = {"stage": "3", "stage3_param_persistence_threshold": "0"}
    settings = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.0, "zero_optimization": zero}

    def inspect(trainer):
        plugin = trainer.accelerator.state.deepspeed_plugin
        return plugin.zero_stage, plugin.hf_ds_config.is_zero3(), trainer.deepspeed.zero_optimization_stage()

    result = train_with_trainer(directory, "zero3", RUN, inspect, deepspeed=settings)
    return result["inspected"], result["engine"]["sharded"]


def test_the_stage_may_be_text_as_deepspeed_has_it(ranks, tmp_path):
    assert ranks(2, train_with_the_stage_as_text, str(tmp_path)) == [((3, True, 3), True)] * 2


def test_every_refusal_is_one_of_the_packages_errors():
    assert issubclass(UnsupportedError, LoSiAError)
    assert issubclass(ConfigError, LoSiAError)


def test_the_default_arguments_of_the_trainer_are_let_through(tmp_path):
    with fresh_accelerate():
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        assert args.optim.value in ("adamw_torch", "adamw_torch_fused")
        trainer = LoSiATrainer(tiny_llama(), args, train_dataset=examples(RUN), losia_config=CONFIG)
        assert type(trainer.create_optimizer()) is LoSiAAdamW
