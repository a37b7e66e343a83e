"""FP8 products (`weight_products`) against the dense reference, which rounds by arithmetic of its own.

Rounding is discontinuous: where two computations differ in the last digit of fp32, one value in about a million falls on the
other side of a rounding, and then differs by up to a sixteenth. So the operations are made equal as far as they can be: the
reference takes each rank's part of a micro-batch as a micro-batch of its own, as the scale of x and dy is one a call. Sums of
FP8 products are then exact or nearly so, and what differs by rounding is dS alone, summed in another order. That is little
enough for these seeds that no value falls on the other side: `test_what_is_compared_is_rounded_alike` counts them. Elsewhere,
if losses differ by 1e-4 and that count is not zero, it is this.
"""

from __future__ import annotations

import pytest

from losia_dist import Drawn, load_checkpoint
from losia_dist.errors import CheckpointError
from losia_dist.subnet import function
from tests.parity.test_compile import train_compiled
from tests.reference import float8
from tests.support import resume as runs
from tests.support.cases import grid, slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3, "weight_products": "fp8"}
SIZES = {"hidden_size": 48, "intermediate_size": 80}
PLAIN = Run(steps=15, model=SIZES, config=CONFIG)
EVERYTHING = variant(PLAIN, accumulation=2, max_grad_norm=0.5, checkpointing="non-reentrant")
ENGINES = ["one", "ddp", "zero2", "zero3", "fsdp2"]
OFTEN = ["one", "zero3", "fsdp2"]


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(run: Run, ranks: int = 1):
        run = variant(run, checkpointing="off")
        key = repr((run, ranks))
        if key not in kept:
            kept[key] = reference(run, split=ranks)
        return kept[key]

    return of


def results(ranks, engine: str, run: Run):
    return [train("one", run)] if engine == "one" else ranks(2, train, engine, run)


@pytest.mark.parametrize("engine", grid(ENGINES, often=OFTEN))
def test_every_engine_equals_it(ranks, expected, engine):
    for result in results(ranks, engine, PLAIN):
        assert_same_run(result, expected(PLAIN, 1 if engine == "one" else 2))


def test_the_reference_does_round(expected):
    config = {name: value for name, value in CONFIG.items() if name != "weight_products"}
    unrounded = expected(variant(PLAIN, config=config))["losses"]
    apart = [abs(a - b) for a, b in zip(expected(PLAIN)["losses"], unrounded, strict=True)]
    assert 1e-3 < max(apart) < 0.1


def test_what_is_compared_is_rounded_alike(monkeypatch):
    ours, theirs = [], []
    real = function.float8_linear

    def linear(x, matrix, bias):
        ours.extend(float8.rounded(operand.detach(), float8.E4M3) for operand in (x, matrix))
        return real(x, matrix, bias)

    def apply(x, weight, bias, real=float8._Products.apply):
        theirs.extend(float8.rounded(operand.detach(), float8.E4M3) for operand in (x, weight))
        return real(x, weight, bias)

    monkeypatch.setattr(function, "float8_linear", linear)
    monkeypatch.setattr(float8._Products, "apply", apply)
    train("one", PLAIN)
    reference(PLAIN)
    a_pass = 3 * 7 * 2  # operands of three layers
    passes = [theirs[i : i + a_pass] for i in range(0, len(theirs), a_pass)][::2]  # importance has one of its own, the first
    expected = [operand for one in passes for operand in one]
    assert len(ours) == len(expected) == PLAIN.steps * a_pass
    apart = sum((a != b).sum().item() for a, b in zip(ours, expected, strict=True))
    assert apart == 0, f"{apart} of {sum(operand.numel() for operand in ours)} values fell on another side"


@pytest.mark.parametrize("engine", grid(ENGINES, often=["zero2"]))
def test_so_does_accumulation_with_clipping_and_checkpointing(ranks, expected, engine):
    for result in results(ranks, engine, EVERYTHING):
        assert_same_run(result, expected(EVERYTHING, 1 if engine == "one" else 2))


VARIANTS = {
    "tied": variant(PLAIN, model={**SIZES, "tie_word_embeddings": True}),
    "drawn": variant(PLAIN, config={**CONFIG, "rank_factor": (1, 0.125), "selection": Drawn()}),
    "reentrant": variant(PLAIN, checkpointing="reentrant"),
    # An MLP of 77 neurons computes as before, attention in FP8.
    "some layers": variant(PLAIN, model={**SIZES, "intermediate_size": 77}),
    "transposed weights and biases": variant(PLAIN, family="gpt2", model={"n_embd": 48}),
    "biases": variant(PLAIN, family="qwen2", model={**SIZES, "head_dim": 16}),
    "over codes": variant(PLAIN, quantized="nf4", config={**CONFIG, "retired": "fp32"}),
    "attention beside experts": variant(
        PLAIN, family="mixture:qwen3_moe", model={"hidden_size": 48, "head_dim": 16}, config={**CONFIG, "layers_per_slot": 2}
    ),
}


@pytest.mark.parametrize("run", [pytest.param(run, id=name) for name, run in VARIANTS.items()])
def test_other_configurations_equal_it_too(expected, run):
    assert_same_run(train("one", run), expected(run))


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_a_compiled_model_equals_it(expected, backend):
    result, breaks, _ = train_compiled("one", PLAIN, whole=True, backend=backend)
    assert_same_run(result, expected(PLAIN))
    assert breaks == 0


@pytest.mark.parametrize("engine", ["one", slow("zero3"), slow("fsdp2")])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(ranks, tmp_path, engine):
    world = 1 if engine == "one" else 2
    undisturbed = ranks(world, runs.train_and_save, engine, PLAIN, tmp_path, (7,))
    for ours, theirs in zip(ranks(world, runs.resume, engine, PLAIN, tmp_path, 7), undisturbed, strict=True):
        assert ours["first"] == 7
        runs.assert_equal(ours, theirs)


def test_a_resume_with_other_products_is_refused(tmp_path):
    run = variant(PLAIN, steps=2)
    runs.train_and_save("one", run, tmp_path, (2,))
    losia, _, close = runs.start("one", variant(run, config={**CONFIG, "weight_products": None}))
    with pytest.raises(CheckpointError, match="saved with weight_products='fp8', and this run has weight_products=None"):
        load_checkpoint(tmp_path, **runs.parts(losia))
    close()
