"""A quantized base: every engine equals the dense reference over the values that its codes stand for."""

from __future__ import annotations

import pytest

from losia_dist import Drawn
from tests.support.cases import grid
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

# Kept in fp32, what a subnet leaves is what it was, as in the reference. In fewer bits the last digit of fp32 decides which
# code a value gets, and runs that are equal to 1e-7 would differ by a code: tests/unit/test_packed.py has those forms.
CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3, "retired": "fp32"}
SIZES = {"hidden_size": 48, "intermediate_size": 80}
PLAIN = Run(steps=26, model=SIZES, config=CONFIG, quantized="nf4:float32:double")
ENGINES = ["one", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2", "fsdp2-noreshard", "hsdp"]
FORMS = ["nf4", "nf4:double", "fp4", "nf4:bfloat16", "int8", "fp8"]


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(run: Run):
        run = variant(run, checkpointing="off", quantized=run.quantized.replace(":float32", "").replace(":bfloat16", ""))
        return kept.setdefault(repr(run), None) or kept.update({repr(run): reference(run)}) or kept[repr(run)]

    return of


def results(ranks, engine: str, run: Run):
    if engine == "one":
        return [train("one", run)]
    return ranks(4 if engine == "hsdp" else 2, train, engine, run)


@pytest.mark.parametrize("engine", grid(ENGINES, often=["zero3", "fsdp2"]))
def test_every_engine_equals_it(ranks, expected, engine):
    for result in results(ranks, engine, PLAIN):
        assert_same_run(result, expected(PLAIN))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_it(expected, form):
    run = variant(PLAIN, quantized=form)
    assert_same_run(train("one", run), expected(run))


EVERYTHING = variant(PLAIN, accumulation=2, max_grad_norm=0.5, checkpointing="non-reentrant")


@pytest.mark.parametrize("engine", grid(["one", "zero2", "zero3", "fsdp2"], often=["one"]))
def test_so_does_accumulation_with_clipping_and_checkpointing(ranks, expected, engine):
    for result in results(ranks, engine, EVERYTHING):
        assert_same_run(result, expected(EVERYTHING))


SHAPES = {
    "all rows": {"rank_factor": (1, 0.125), "selection": Drawn()},
    "all columns": {"rank_factor": (0.125, 1)},
    "some layers only": {"target_modules": ["q_proj", "down_proj"], "output_rank_factor": None},
}


@pytest.mark.parametrize("shape, engine", grid(SHAPES, ["one", "fsdp2", "zero3"], often=[f"{shape}-one" for shape in SHAPES]))
def test_so_do_other_subnets(ranks, expected, engine, shape):
    run = variant(PLAIN, config={**CONFIG, **shape})
    for result in results(ranks, engine, run):
        assert_same_run(result, expected(run))


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_so_does_a_model_whose_layers_are_compiled(expected, targets):
    run = variant(PLAIN, steps=8, config={**CONFIG, "target_modules": targets, "output_rank_factor": None})

    def compile_layers(stage, losia, engine):
        if stage == "before" and losia.steps == 0:
            for layer in losia.model.model.layers:
                layer.compile()

    assert_same_run(train("one", run, compile_layers), expected(run))
