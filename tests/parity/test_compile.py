"""`torch.compile` on the model, or on each decoder layer: equal results, one graph, and no new compilation as slots move on."""

import pytest
import torch
from torch._dynamo.utils import counters

from losia_dist import Located
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

RUN = Run(steps=16, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3, "layers_per_slot": 1})


def train_compiled(engine: str, run: Run, *, whole: bool, backend: str = "aot_eager"):
    """As `train`, with the model compiled as it comes; returns the result, and what the compiler counted."""
    torch._dynamo.reset()
    counters.clear()

    def compiled(model: torch.nn.Module) -> None:
        for module in [model] if whole else model.model.layers:
            module.compile(backend=backend)

    result = train(engine, run, prepare=compiled)
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return result, breaks, graphs


@pytest.fixture(scope="module")
def expected():
    return reference(RUN)


@pytest.mark.parametrize("tied", [slow(False), True])
def test_a_whole_model_is_one_graph_through_all_slots(expected, tied):
    run = variant(RUN, model={"tie_word_embeddings": True}) if tied else RUN
    result, breaks, graphs = train_compiled("one", run, whole=True)
    assert_same_run(result, reference(run) if tied else expected)
    assert (breaks, graphs) == (0, 1)


@pytest.mark.slow
def test_with_accumulation_and_clipping():
    run = variant(RUN, accumulation=3, max_grad_norm=0.5)
    result, breaks, _ = train_compiled("one", run, whole=True)
    assert_same_run(result, reference(run))
    assert breaks == 0


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_layers_that_share_columns_are_located_as_they_are_without(backend):
    run = variant(RUN, config={**RUN.config, "selection": Located(share_columns=True), "period": 2})
    result, breaks, graphs = train_compiled("one", run, whole=True, backend=backend)
    assert_same_run(result, reference(run))
    assert (breaks, graphs) == (0, 1)


@pytest.mark.parametrize("engine", [slow("ddp"), slow("zero2"), "fsdp2"])
def test_decoder_layers_compiled_one_by_one(ranks, expected, engine):
    for result, breaks, graphs in ranks(2, train_compiled, engine, RUN, whole=False):
        assert_same_run(result, expected)
        assert breaks == 0
        assert graphs <= 2  # the layers share their code; the first one's input needs no gradient


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="experts need torch 2.10 or newer")
@pytest.mark.parametrize("engine", ["one", slow("ddp"), slow("fsdp2")])
def test_decoder_layers_with_experts_compiled_one_by_one(ranks, engine):
    config = {"rank_factor": 0.25, "period": 2, "layers_per_slot": 2, "experts_per_slot": 2}
    run = variant(RUN, family="mixture:qwen3_moe", config=config)
    results = (
        ranks(2, train_compiled, engine, run, whole=False) if engine != "one" else [train_compiled("one", run, whole=False)]
    )
    for result, breaks, graphs in results:
        assert_same_run(result, reference(run))
        assert breaks == 0
        assert graphs <= 4  # the layers share their code; of their experts the number of tokens may come in


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_the_default_compiler(expected, whole):
    result, breaks, _ = train_compiled("one", RUN, whole=whole, backend="inductor")
    assert_same_run(result, expected)
    assert breaks == 0
