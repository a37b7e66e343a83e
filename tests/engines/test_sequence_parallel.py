"""Where ranks share each sequence: bad input is one error on every rank, before it waits; and the scale of gradients."""

import re

import pytest
import torch
import torch.distributed as dist

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups, split_sequence
from losia_dist.errors import ConfigError
from losia_dist.loss.sequence_loss import sum_over_sequence
from tests.support.cases import slow
from tests.support.models import tiny_llama
from tests.support.sequences import Run, begin, build, end, mean_loss, parts, train_batches, weighted_loss

RUN = Run(steps=2)
CONFIG = LoSiAConfig(rank_factor=0.25, period=2)


def start(size: int = 2, **model) -> None:
    settings = {"train_micro_batch_size_per_gpu": 2, "sequence_parallel_size": size}
    initialize(model=build(Run(model=model)), losia_config=CONFIG, config=settings)


UNFIT = {
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 3}, "ConfigError", "LlamaForCausalLM has 3 of queries"),
    "keys": (
        {"num_attention_heads": 12, "num_key_value_heads": 3},
        "ConfigError",
        "12 of queries and 3 of keys. Choose a number of ranks",
    ),
    "eager": ({"attn_implementation": "eager"}, "UnsupportedError", "attn_implementation='eager'.*attn_implementation='sdpa'"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_whose_sequences_cannot_be_shared_is_refused(ranks, kind):
    model, error, words = UNFIT[kind]
    for found, message in ranks.errors(2, start, 2, **model):
        assert found == error
        assert re.search(words, message), message


def test_ranks_that_make_no_equal_groups_are_refused(ranks):
    for kind, message in ranks.errors(2, start, 3):
        assert kind == "ConfigError" and "sequence_parallel_size=3: the 2 ranks are cut into groups" in message


def window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=32, num_key_value_heads=2, sliding_window=8, **sizes))
    initialize(model=model, losia_config=CONFIG, config={"train_micro_batch_size_per_gpu": 2, "sequence_parallel_size": 2})


def test_attention_over_a_window_is_refused(ranks):
    for kind, message in ranks.errors(2, window):
        assert kind == "UnsupportedError" and "over a window of 8 tokens" in message


def run_with(change: str, stage: int = 0) -> None:
    """One step in which a batch, or the loss, is not what it must be."""
    engine = begin(RUN, stage, 2)
    group = engine.losia.sequence.group
    (part,) = parts(train_batches(RUN)[0], 2)
    try:
        if change == "no positions":
            part.pop("position_ids")
        if change == "labels":
            part.pop("shift_labels")
        if change == "unlike lengths" and dist.get_rank() == 1:
            part = {name: value[:, :-1] for name, value in part.items()}
        if change == "own mean":
            loss = engine(**part, use_cache=False).loss
        elif change == "summed in value alone":
            loss = engine(**part, use_cache=False, num_items_in_batch=10).loss
            whole = loss.detach().clone()
            dist.all_reduce(whole)
            loss = loss - loss.detach() + whole
        else:
            loss = mean_loss(engine, part, group)
        engine.backward(loss)
        engine.step()
    finally:
        end(engine)


WRONG = {
    "no positions": "the batch has no position_ids, and 2 ranks share each sequence",
    "labels": "labels were passed without shift_labels",
    "unlike lengths": "parts of unlike shapes .in this group ..4, 6., .4, 5..",
    "own mean": "the loss differs between the 2 ranks that share a sequence",
    "summed in value alone": "no gradient goes back through what summed it",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_batch_or_a_loss_that_is_not_of_whole_sequences_is_one_error(ranks, change):
    for kind, message in ranks.errors(2, run_with, change):
        assert kind == "ConfigError"
        assert re.search(WRONG[change], message), message


def one_step_without_correction(stage: int, max_norm: float) -> None:
    from losia_dist.sharding import sequence_parallel

    kept = sequence_parallel.average_over_all_ranks
    sequence_parallel.average_over_all_ranks = lambda engine: False
    run = Run(steps=1, max_grad_norm=max_norm)
    engine = None
    try:
        engine = begin(run, stage, 2)
        (part,) = parts(train_batches(run)[0], 2)
        engine.backward(weighted_loss(engine, part, 20))
        engine.step()
    finally:
        sequence_parallel.average_over_all_ranks = kept
        if engine is not None:
            end(engine)


@pytest.mark.parametrize("stage, max_norm", [(0, 0.0), slow(1, 0.0), (2, 0.2), slow(2, 0.0)])
def test_gradients_that_are_too_large_are_seen_in_the_first_step(ranks, stage, max_norm):
    words = "the norm of its reduced gradients for" if max_norm else "the first step was made by gradients of norm"
    for kind, message in ranks.errors(2, one_step_without_correction, stage, max_norm):
        assert kind == "DivergenceError" and words in message


def one_plain_step(factor: float) -> None:
    model = get_losia_model(tiny_llama(), CONFIG)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, CONFIG)
    tokens = torch.arange(16).view(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= factor
    optimizer.step()
    losia.step()
    losia.detach()


def test_a_plain_loop_may_clip_gradients_and_not_make_them_larger():
    one_plain_step(1.0)
    one_plain_step(0.1)
    with pytest.raises(Exception, match="Average them over the ranks"):
        one_plain_step(2.0)


BATCH = {"input_ids": torch.arange(10).view(2, 5), "labels": torch.arange(10).view(2, 5)}


def test_a_batch_is_cut_with_the_targets_that_lie_on_other_ranks():
    parts = [split_sequence(BATCH, rank=rank, size=2, pad_token_id=0) for rank in range(2)]
    joined = {name: torch.cat([part[name] for part in parts], dim=1).tolist() for name in parts[0]}
    assert joined["input_ids"] == [[0, 1, 2, 3, 4, 0], [5, 6, 7, 8, 9, 0]]
    assert joined["shift_labels"] == joined["labels"] == [[1, 2, 3, 4, -100, -100], [6, 7, 8, 9, -100, -100]]
    assert joined["position_ids"] == [[0, 1, 2, 3, 4, 5]] * 2
    packed = {**BATCH, "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    last = split_sequence(packed, rank=1, size=2, pad_token_id=0)
    assert last["position_ids"].tolist() == [[1, 2, 0]] * 2  # padding is a record of its own


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, "a length of 5 tokens is not divided by the 2 ranks"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}, "zeros that are not on the right"),
        ({"labels": None}, "the batch has no labels"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_an_error(change, words):
    batch = {name: value for name, value in {**BATCH, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        split_sequence(batch, rank=0, size=2)


def test_a_rank_alone_has_the_whole_loss():
    loss = torch.ones(())
    assert sum_over_sequence(loss, None) is loss
