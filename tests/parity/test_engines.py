"""Configurations, ties, optimizers and sizes besides those of the support matrix, against the dense reference."""

import pytest

from losia_dist import Located, LoSiAConfig
from losia_dist.formulas import cycle_steps
from tests.support.cases import grid, slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

PLAIN = Run()
ACCUMULATED = variant(PLAIN, accumulation=3, max_grad_norm=0.5)
VARIANTS = {
    "pair of factors, two layers a slot, own ramp": {
        "rank_factor": (0.5, 0.1),
        "period": 4,
        "layers_per_slot": 2,
        "rewarm_steps": 2,
        "selection": Located("first_order"),
    },
    "norms and embeddings trained in full, bias correction kept": {
        "rank_factor": 0.3,
        "period": 5,
        "train_norms": True,
        "train_embeddings": True,
        "full_lr_scale": 0.25,
        "reset_bias_correction": False,
        "selection": Located("second_order"),
    },
    "all columns, no rewarming": {
        "rank_factor": (0.1, 1),
        "period": 3,
        "rewarm_steps": 0,
        "target_modules": ["q_proj", "mlp.down_proj"],
    },
}

OFTEN = [f"{name}-{engine}" for name in VARIANTS for engine in ("one", "ddp", "zero2")]
OFTEN += [f"{name}-fsdp2" for name in list(VARIANTS)[1:]]


def run_on(ranks, engine: str, run: Run):
    """Results of every rank; one process needs no pool."""
    return [train("one", run)] if engine == "one" else ranks(2, train, engine, run)


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(run: Run):
        key = repr(run)
        if key not in kept:
            kept[key] = reference(variant(run, checkpointing="off", deepspeed={}))
        return kept[key]

    return of


def test_the_run_spans_two_cycles_and_clips():
    config = LoSiAConfig(**PLAIN.config)
    assert PLAIN.steps >= 2 * cycle_steps(4, config.period, config.layers_per_slot)
    clipped, free = reference(ACCUMULATED), reference(variant(ACCUMULATED, max_grad_norm=0.0))
    assert clipped["losses"] != free["losses"]


@pytest.mark.parametrize("config, engine", grid(VARIANTS, ["one", "ddp", "zero2", "zero3", "fsdp2"], often=OFTEN))
def test_other_configurations_equal_it_too(ranks, expected, engine, config):
    run = variant(PLAIN, config=config, steps=16)
    for result in run_on(ranks, engine, run):
        assert_same_run(result, expected(run))


@pytest.mark.parametrize("engine", ["one", "ddp", "zero2", slow("zero3")])
def test_tied_embeddings_train_as_one_weight(ranks, expected, engine):
    run = variant(ACCUMULATED, model={"tie_word_embeddings": True}, steps=16, config={**PLAIN.config, "period": 2})
    for result in run_on(ranks, engine, run):
        assert_same_run(result, expected(run))


CHECKPOINTED = ["non-reentrant-one", "reentrant-one"]  # sharded: FSDP2 in test_matrix.py


@pytest.mark.parametrize("checkpointing, engine", grid(["non-reentrant", "reentrant"], ["one", "zero3"], often=CHECKPOINTED))
def test_gradient_checkpointing_of_both_kinds_equals_it(ranks, expected, engine, checkpointing):
    run = variant(PLAIN, checkpointing=checkpointing, steps=20)
    for result in run_on(ranks, engine, run):
        assert_same_run(result, expected(run))


@pytest.mark.parametrize("engine", ["one", "fsdp2", slow("ddp"), slow("zero2"), slow("zero3")])
def test_importance_of_some_steps_of_a_slot_equals_it(ranks, expected, engine):
    """Two of five steps; in the others no full gradient is formed, and other subnets are chosen than from all steps."""
    config = {**PLAIN.config, "selection": Located(importance_steps=2)}
    run = variant(PLAIN, config=config, steps=20, accumulation=2, checkpointing="non-reentrant")
    formed = []

    def count(stage, losia, engine):
        if stage == "before":
            formed.append(
                any(accumulator.gradient is not None or accumulator.pending for accumulator in losia.accumulators.values())
            )

    results = [train("one", run, count)] if engine == "one" else ranks(2, train, engine, run)
    if engine == "one":
        assert formed == [step % 5 in (2, 4) for step in range(20)]
    for result in results:
        assert_same_run(result, expected(run))
    assert str(expected(run)["history"]) != str(expected(variant(run, config=PLAIN.config))["history"])


@pytest.mark.parametrize("engine", ["fsdp2", slow("zero3")])
def test_four_ranks_with_uneven_row_blocks_equal_it(ranks, expected, engine):
    run = variant(PLAIN, steps=10, config={"rank_factor": 0.5, "period": 2}, model={"num_hidden_layers": 2})
    for result in ranks(4, train, engine, run):
        assert_same_run(result, expected(run))


CPU_ADAM = pytest.mark.slow  # compiles DeepSpeed's operator first
OPTIMIZERS_OF_DEEPSPEED = [
    ("zero2", {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.0, "torch_adam": True}}, "AdamW"),
    pytest.param(
        "zero2-offload",
        {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.0}},
        "DeepSpeedCPUAdam",
        marks=CPU_ADAM,
    ),
    pytest.param("zero3-offload", {"type": "Adam", "params": {"lr": 1e-3, "eps": 1e-6}}, "DeepSpeedCPUAdam", marks=CPU_ADAM),
]


def train_with(engine: str, run: Run, kind: str):
    def inspect(stage, losia, engine):
        assert type(losia.state.optimizer).__name__ == kind

    return train(engine, run, inspect)


@pytest.mark.parametrize("engine, optimizer, kind", OPTIMIZERS_OF_DEEPSPEED)
def test_optimizers_of_deepspeed_named_in_its_configuration_equal_it(ranks, expected, engine, optimizer, kind):
    run = variant(PLAIN, steps=16, deepspeed={"optimizer": optimizer})
    for result in ranks(2, train_with, engine, run, kind):
        assert_same_run(result, expected(run))


def test_small_weights_that_stage_3_keeps_whole_are_rewritten_too(ranks, expected):
    kept_whole = {"zero_optimization": {"stage3_param_persistence_threshold": 3000}}
    run = variant(PLAIN, steps=10, config={**PLAIN.config, "period": 2}, deepspeed=kept_whole)
    for result in ranks(2, train, "zero3", run):
        assert_same_run(result, expected(run))
