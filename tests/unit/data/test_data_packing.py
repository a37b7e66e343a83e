"""Packing: rows are full, nothing is lost, and no record sees another one."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from losia_dist.data import PackedDataset, TokenizedDataset, make_evaluation_loader, prepare_for_packing
from losia_dist.data.encoding import Encoded
from losia_dist.data.packing import best_fit
from losia_dist.errors import DataError

PAD = 2
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD)


def examples_of(lengths, max_length):
    generator = random.Random(0)
    dataset = TokenizedDataset(max_length)
    for length in lengths:
        dataset.append(Encoded([generator.randrange(3, 50) for _ in range(length)], [False] + [True] * (length - 1)))
    return dataset


def tiny_llama(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def spans(position_ids):
    """(start, stop) of each record in a flat row, padding included."""
    starts = [*(position_ids == 0).nonzero().flatten().tolist(), len(position_ids)]
    return list(zip(starts[:-1], starts[1:], strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_those_of_each_record_alone(attention, flatten, training):
    model = tiny_llama(attention).train(training)
    assert model.config.use_cache  # the default, under which records would see each other
    prepare_for_packing(model)
    dataset = PackedDataset(examples_of([7, 5, 3, 9, 1, 6, 2], 16), 16, PAD)
    compared = 0
    for batch in make_evaluation_loader(dataset, TOKENIZER, 3, flatten=flatten):
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        assert batch["input_ids"].shape == ((1, 48) if flatten else (3, 16))
        assert {str(column.dtype) for column in batch.values()} == {"torch.int64"}
        with torch.no_grad():
            packed = model(**batch)
        for row, ids in enumerate(batch["input_ids"]):
            for start, stop in spans(batch["position_ids"][row]):
                with torch.no_grad():
                    alone = model(input_ids=ids[None, start:stop])
                torch.testing.assert_close(packed.logits[row, start:stop], alone.logits[0], atol=1e-5, rtol=0)
                compared += 1
    assert compared >= 7


def test_a_packed_step_has_the_gradients_of_its_records_alone():
    model = tiny_llama()
    prepare_for_packing(model)
    examples = examples_of([7, 5, 3, 9, 6, 2], 16)
    targets = examples.report().answer_tokens
    for batch in make_evaluation_loader(PackedDataset(examples, 16, PAD), TOKENIZER, 2):
        model(**batch, num_items_in_batch=targets).loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for batch in make_evaluation_loader(examples, TOKENIZER, 4):
        model(**batch, num_items_in_batch=targets).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_flash_attention_is_told_the_same_records():
    # Flash kernels need a GPU. What they are given is computed from position_ids, and that runs anywhere.
    flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
    dataset = PackedDataset(examples_of([7, 5, 3, 9, 1, 6, 2], 16), 16, PAD)
    (batch,) = make_evaluation_loader(dataset, TOKENIZER, 3)
    position_ids = batch["position_ids"]
    assert flash._is_packed_sequence(position_ids, batch_size=1)
    (boundaries, _), _ = flash.prepare_fa_kwargs_from_position_ids(position_ids)
    assert boundaries.tolist() == [0, *(stop for _, stop in spans(position_ids[0]))]


def test_rows_hold_whole_records_and_start_each_without_loss():
    examples = examples_of([7, 5, 3, 9, 1, 6, 2, 16], 16)
    dataset = PackedDataset(examples, 16, PAD)
    found = []
    for row in dataset:
        assert all(column.shape == (16,) and column.dtype == torch.int64 for column in row.values())
        for start, stop in spans(row["position_ids"]):
            assert row["position_ids"][start:stop].tolist() == list(range(stop - start))
            assert row["labels"][start] == -100
            piece = row["input_ids"][start:stop].tolist()
            if piece != [PAD] * len(piece):
                found.append((piece, row["labels"][start:stop].tolist()))
            else:
                assert stop == 16 and (row["labels"][start:stop] == -100).all()
    assert sorted(found) == sorted((e["input_ids"].tolist(), e["labels"].tolist()) for e in examples)
    report = dataset.report()
    assert (report.rows, report.row_tokens, report.tokens) == (len(dataset), 16 * len(dataset), 49)


def test_best_fit_fills_rows():
    generator = random.Random(1)
    lengths = [generator.randint(1, 100) for _ in range(2000)]
    rows = best_fit(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(2000))
    assert all(sum(lengths[item] for item in row) <= 100 for row in rows)
    assert sum(lengths) / (100 * len(rows)) > 0.98
    assert [list(row) for row in rows] == [list(row) for row in best_fit(lengths, 100)]
    assert [list(row) for row in best_fit([4, 4, 4, 4], 8)] == [[0, 1], [2, 3]]
    assert [list(row) for row in best_fit([8, 8], 8)] == [[0], [1]]


def test_flash_attention_asks_for_rows_end_to_end():
    model = tiny_llama()
    assert prepare_for_packing(model) is False
    model.config._attn_implementation = "flash_attention_2"
    assert prepare_for_packing(model) is True
    assert model.config.use_cache is False


def test_a_model_that_ignores_where_records_start_is_refused():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=50, max_position_embeddings=64, **sizes))
    with pytest.raises(DataError, match=r"OPTForCausalLM lets packed records see each other.*Turn packing off"):
        prepare_for_packing(model)


def test_preparing_leaves_the_model_as_it_was_and_needs_no_weights():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prepare_for_packing(model)
    assert [module.training for module in model.modules()] == modes
    with torch.device("meta"):
        assert prepare_for_packing(tiny_llama()) is False


def test_models_that_cannot_keep_records_apart_are_refused():
    model = tiny_llama()
    model.config._attn_implementation = "home_made"
    with pytest.raises(DataError, match=r"'home_made', which is not known .*attn_implementation='sdpa'"):
        prepare_for_packing(model)
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(DataError, match=r"carry state .*\(linear_attention\).*Turn packing off"):
        prepare_for_packing(model)

    class WithoutPositions(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(DataError, match=r"WithoutPositions takes no position_ids"):
        prepare_for_packing(WithoutPositions())
