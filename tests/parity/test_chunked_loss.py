"""The loss without all logits at once, with other chunks on every rank, against the dense reference."""

import pytest
import torch.distributed as dist

from losia_dist import LoSiAConfig
from losia_dist.loss import use_chunked_loss
from tests.support import training
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, variant


def train_chunked(engine, run):
    """`tests.support.training.train` with a chunked loss, cut differently on every rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    chunk = (5, 64)[rank % 2]
    convert, prepare = training.get_losia_model, training.prepared_model
    if engine.startswith("zero"):  # DeepSpeed's initialize finds the model converted
        training.prepared_model = lambda run: use_chunked_loss(convert(prepare(run), LoSiAConfig(**run.config)), chunk)
    else:
        training.get_losia_model = lambda model, config: use_chunked_loss(convert(model, config), chunk)
    try:
        return training.train(engine, run)
    finally:
        training.get_losia_model, training.prepared_model = convert, prepare


RUN = Run(steps=20, accumulation=2, max_grad_norm=0.5)
TIED = variant(RUN, model={"tie_word_embeddings": True})
FROZEN = variant(RUN, config={"rank_factor": 0.25, "period": 5})


@pytest.fixture(scope="module")
def expected():
    kept = {}
    return lambda run: kept.setdefault(repr(run), None) or kept.update({repr(run): reference(run)}) or kept[repr(run)]


@pytest.mark.parametrize(
    "engine, run",
    [
        ("one", RUN),
        ("ddp", RUN),
        slow("zero2", TIED),
        slow("zero3", RUN),
        slow("zero3", FROZEN),
        slow("zero3", TIED),
        slow("fsdp2", RUN),
        ("fsdp2", variant(TIED, checkpointing="non-reentrant")),
        slow("fsdp2-noreshard", FROZEN),
    ],
)
def test_engines_equal_the_reference_with_different_chunks_on_each_rank(ranks, expected, engine, run):
    results = [train_chunked(engine, run)] if engine == "one" else ranks(2, train_chunked, engine, run)
    for result in results:
        assert_same_run(result, expected(variant(run, checkpointing="off")))
