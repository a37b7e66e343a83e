"""LoSiATrainer against the dense reference, on every engine that it drives: losses, whole weights and selected indices."""

import pytest
import torch
from transformers import TrainingArguments

from losia_dist import LoSiAConfig, LoSiATrainer
from tests.support import training
from tests.support.cases import only, slow
from tests.support.compare import assert_same_run
from tests.support.models import tiny_llama
from tests.support.trainers import examples, fresh_accelerate, linear_rate, masked, train_with_trainer
from tests.support.training import Run, reference, variant

PLAIN = Run(steps=20, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 4})
EVERYTHING = variant(PLAIN, accumulation=4, max_grad_norm=0.5)
DEEPSPEED = {"type": "DEEPSPEED", "world size": 2, "wrapper": "DeepSpeedEngine"}
ENGINES = {
    "one": {"type": "NO", "world size": 1, "wrapper": "LlamaForCausalLM", "sharded": False},
    "ddp": {"type": "MULTI_CPU", "world size": 2, "wrapper": "DistributedDataParallel", "sharded": False},
    "zero0": {**DEEPSPEED, "sharded": False},
    "zero1": {**DEEPSPEED, "sharded": False},
    "zero2": {**DEEPSPEED, "sharded": False},
    "zero3": {**DEEPSPEED, "sharded": True},
    "fsdp2": {"type": "FSDP", "world size": 2, "wrapper": "FSDPLlamaForCausalLM", "sharded": True},
}


@pytest.fixture
def expected(monkeypatch):
    def of(run: Run):
        monkeypatch.setattr(training, "rate_at", linear_rate)
        return reference(variant(run, deepspeed={}))

    return of


def train_on(ranks, tmp_path, engine, run, **changes):
    if engine == "one":
        return [train_with_trainer(str(tmp_path), engine, run, **changes)]
    return ranks(2, train_with_trainer, str(tmp_path), engine, run, **changes)


@pytest.mark.parametrize("engine", only(["one", "ddp"], ENGINES.keys()))
def test_with_accumulation_and_clipping_it_equals_the_dense_reference(ranks, tmp_path, expected, engine):
    for result in train_on(ranks, tmp_path, engine, EVERYTHING):
        assert result["engine"] == ENGINES[engine]
        assert_same_run(result, expected(EVERYTHING))


@pytest.mark.parametrize("engine", ["one", slow("ddp"), slow("zero2"), slow("zero3"), "fsdp2"])
def test_a_mixture_of_experts_equals_it_and_its_balance_is_logged(ranks, tmp_path, expected, engine):
    config = {"rank_factor": 0.25, "period": 2, "experts_per_slot": 2}
    run = variant(PLAIN, family="mixture:qwen3_moe", steps=16, max_grad_norm=0.5, config=config)
    for result in train_on(ranks, tmp_path, engine, run):
        assert_same_run(result, expected(run))
        logged = [entry for entry in result["log"] if "loss" in entry]
        assert all(0 < entry["losia/experts_trained"] < 1 and entry["losia/experts_busiest"] > 1 for entry in logged)


QUANTIZED = variant(
    PLAIN,
    quantized="nf4:float32:double",
    model={"hidden_size": 48, "intermediate_size": 80},
    steps=16,
    max_grad_norm=0.5,
    config={"rank_factor": 0.25, "period": 2, "retired": "fp32"},
)
EXPERTS = variant(
    QUANTIZED,
    quantized="nf4:float32:double:experts",
    family="mixture:qwen3_moe",
    model={"hidden_size": 32, "moe_intermediate_size": 24, "head_dim": 16},
    config={**QUANTIZED.config, "experts_per_slot": 2},
)


@pytest.mark.parametrize(
    "engine, run",
    [("one", QUANTIZED), *(slow(engine, QUANTIZED) for engine in ("ddp", "zero2", "zero3")), ("fsdp2", QUANTIZED)]
    # Beside linear layers, experts go another way through Accelerate on FSDP2 alone, which has to shard their codes.
    + [*(slow(engine, EXPERTS) for engine in ("one", "ddp", "zero0", "zero1", "zero2", "zero3")), ("fsdp2", EXPERTS)],
)
def test_a_quantized_base_equals_it(ranks, tmp_path, expected, engine, run):
    for result in train_on(ranks, tmp_path, engine, run, inspect=are_quantized):
        assert result["inspected"] and result["engine"]["sharded"] == (engine in ("zero3", "fsdp2"))
        assert_same_run(result, expected(run))


def are_quantized(trainer):
    """Whether all layers and experts with subnets are."""
    return all(site.packed is not None for site in trainer.losia.sites)


def test_a_model_that_was_loaded_in_4_bits_trains_and_its_checkpoints_are_plain_models(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=48, intermediate_size=80).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, dtype=torch.float32)
    assert model.is_quantized
    config = LoSiAConfig(rank_factor=0.25, period=2)
    with fresh_accelerate():
        given = TrainingArguments(
            str(tmp_path / "run"), max_steps=4, save_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[]
        )
        trainer = LoSiATrainer(model, given, train_dataset=examples(variant(PLAIN, steps=4)), losia_config=config)
        trainer.train()
        assert all(site.packed is not None for site in trainer.losia.sites)
        trained = trainer.model.eval()
        tokens = torch.arange(3, 19).reshape(1, 16)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4", dtype=torch.float32)
        torch.testing.assert_close(plain(tokens).logits, trained(tokens).logits, rtol=0, atol=1e-5)


def save_base(tmp_path, run):
    """The run's model in a directory, to be read back as users do."""
    directory = tmp_path / "base"
    tiny_llama(**run.model).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("engine", [slow("zero3"), "fsdp2"])
def test_a_tied_output_subnet_and_norms_that_train_equal_it_from_a_model_read_from_disk(ranks, tmp_path, expected, engine):
    run = variant(
        PLAIN, steps=16, model={"tie_word_embeddings": True}, max_grad_norm=0.5, config={**PLAIN.config, "train_norms": True}
    )
    base = save_base(tmp_path, run)
    for result in train_on(ranks, tmp_path, engine, run, load_from=base):
        assert result["engine"] == ENGINES[engine]
        assert_same_run(result, expected(run))


@pytest.mark.parametrize("engine, reentrant", [("one", True), slow("fsdp2", False), slow("zero3", True)])
def test_gradient_checkpointing_turned_on_by_the_trainer_equals_it(ranks, tmp_path, expected, engine, reentrant):
    run = variant(PLAIN, steps=8)
    kind = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for result in train_on(ranks, tmp_path, engine, run, **kind):
        assert_same_run(result, expected(run))


def test_an_optimizer_named_in_the_deepspeed_configuration_is_used_in_groups(ranks, tmp_path, expected):
    named = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": 0.0, "torch_adam": True}}
    auto = {"enabled": "auto"}
    run = variant(PLAIN, steps=8, deepspeed={"optimizer": named, "fp16": auto, "bf16": auto})
    for result in train_on(ranks, tmp_path, "zero2", run, inspect=kind_of_optimizer):
        assert result["inspected"] == "AdamW"
        assert_same_run(result, expected(run))


def kind_of_optimizer(trainer):
    return type(trainer.losia.state.optimizer).__name__


def test_examples_with_different_numbers_of_labels_weigh_by_token_over_ranks_and_micro_batches(
    ranks, tmp_path, expected, monkeypatch
):
    run = variant(PLAIN, steps=12, accumulation=2)
    data = [masked(example, place) for place, example in enumerate(examples(run))]
    size = run.batch * run.accumulation  # the reference sees a step's examples at once, so its mean is over tokens
    steps = [data[start : start + size] for start in range(0, len(data), size)]
    whole = [[{key: torch.stack([e[key] for e in step]) for key in ("input_ids", "labels")}] for step in steps]
    monkeypatch.setattr(training, "global_batches", lambda run: whole)
    wanted = expected(run)
    for engine in ("one", "ddp"):
        for result in train_on(ranks, tmp_path, engine, run, mask=True):
            assert_same_run(result, wanted)


def test_bf16_under_fsdp2_keeps_bf16_weights_and_fp32_subnets(ranks, tmp_path, expected):
    run = variant(PLAIN, steps=8, dtype="bf16")
    for result in train_on(ranks, tmp_path, "fsdp2", run, inspect=dtypes, bf16=True):
        assert result["engine"] == ENGINES["fsdp2"]
        assert result["inspected"] == ({"torch.bfloat16"}, {"torch.float32"})
        differences = [abs(a - b) for a, b in zip(result["losses"], expected(run)["losses"], strict=True)]
        assert max(differences) < 0.1  # a lost master value or update would show as a drift


def dtypes(trainer):
    layers = trainer.losia.sites
    return {str(layer.weight.dtype) for layer in layers}, {str(layer.subnet.dtype) for layer in layers}
