"""Batches: padding, the order over ranks and epochs, and held-out loss that counts each example once."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from losia_dist.data import PackedDataset, TokenizedDataset, count_targets, make_evaluation_loader, make_loader
from losia_dist.data.encoding import Encoded
from losia_dist.errors import ConfigError, DataError

EOS = 2
TOKENIZER = SimpleNamespace(pad_token_id=EOS, eos_token_id=EOS)


def dataset_of(lengths):
    """Examples that begin with 10 + their index and end with eos; all but the first token is learned."""
    dataset = TokenizedDataset(64)
    for index, length in enumerate(lengths):
        ids = [10 + index] * (length - 1) + [EOS]
        dataset.append(Encoded(ids, [False] + [True] * (length - 1)))
    return dataset


def first_tokens(batches):
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def test_padding_is_told_by_position_and_the_end_of_turn_stays_learned():
    dataset = dataset_of([3, 5])
    (batch,) = make_evaluation_loader(dataset, TOKENIZER, 2)
    assert batch["input_ids"].tolist() == [[10, 10, EOS, EOS, EOS], [11, 11, 11, 11, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 10, EOS, -100, -100], [-100, 11, 11, 11, EOS]]
    assert {str(column.dtype) for column in batch.values()} == {"torch.int64"}
    assert count_targets(batch) == 2 + 4


@pytest.mark.parametrize(("pad", "eos", "used"), [(7, EOS, 7), (None, EOS, EOS), (None, None, 0), (0, EOS, 0)])
def test_any_token_serves_as_padding(pad, eos, used):
    dataset = dataset_of([2, 3])
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    (batch,) = make_evaluation_loader(dataset, tokenizer, 2)
    assert batch["input_ids"][0, 2] == used


def rank_loaders(dataset, micro_batch, world_size, **options):
    return [make_loader(dataset, TOKENIZER, micro_batch, rank=r, world_size=world_size, **options) for r in range(world_size)]


@pytest.mark.parametrize(("examples", "micro_batch", "world_size"), [(13, 2, 3), (12, 2, 3), (11, 2, 3), (9, 4, 2)])
def test_all_ranks_make_as_many_batches_of_one_size(examples, micro_batch, world_size):
    loaders = rank_loaders(dataset_of([4] * examples), micro_batch, world_size)
    sizes = [[len(batch["labels"]) for batch in loader] for loader in loaders]
    assert all(size == sizes[0] for size in sizes) and sizes[0]
    assert [len(loader) for loader in loaders] == [len(sizes[0])] * world_size
    assert set(sizes[0]) == {micro_batch}


def test_the_order_depends_on_seed_and_epoch_alone():
    dataset = dataset_of([4] * 12)

    def order(seed, epoch):
        loader = make_loader(dataset, TOKENIZER, 4, seed=seed)
        torch.manual_seed(torch.seed() % 1000)  # whatever the program drew before
        loader.sampler.set_epoch(epoch)
        return first_tokens(loader)

    assert order(3, 0) == order(3, 0)
    assert order(3, 0) != order(3, 1)
    assert order(3, 0) != order(8, 0)


def test_a_loader_leaves_the_global_random_state_alone():
    loader = make_loader(dataset_of([4] * 12), TOKENIZER, 4)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_sees_the_same_examples_on_any_number_of_ranks():
    dataset = dataset_of([4] * 26)
    one, two = rank_loaders(dataset, 4, 1, seed=5), rank_loaders(dataset, 2, 2, seed=5)
    steps_of_one = [sorted(step) for step in first_tokens(one[0])]
    steps_of_two = [sorted(a + b) for a, b in zip(*(first_tokens(loader) for loader in two), strict=True)]
    assert steps_of_one == steps_of_two


def test_a_data_set_too_small_for_one_batch_is_refused():
    with pytest.raises(DataError, match=r"5 examples do not fill one batch .*micro_batch=2 on 3 ranks needs 6.*Give more data"):
        rank_loaders(dataset_of([4] * 5), 2, 3)


def test_settings_that_cannot_work_are_refused():
    dataset = dataset_of([4, 4])
    for make in (make_loader, make_evaluation_loader):
        with pytest.raises(ConfigError, match="micro_batch=0"):
            make(dataset, TOKENIZER, 0)
        with pytest.raises(ConfigError, match="rank=2 with world_size=2"):
            make(dataset, TOKENIZER, 1, rank=2, world_size=2)


@pytest.mark.parametrize(("examples", "micro_batch", "world_size"), [(7, 2, 3), (6, 2, 3), (1, 2, 4), (9, 1, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_held_out_loss_is_that_of_one_process(examples, micro_batch, world_size, packed):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            use_cache=False,
        )
    ).eval()
    plain = dataset_of([3 + index % 4 for index in range(examples)])
    dataset = PackedDataset(plain, 12, EOS) if packed else plain

    def held_out(world_size):
        loss_sum, targets, batches = 0.0, 0, []
        for rank in range(world_size):
            loader = make_evaluation_loader(dataset, TOKENIZER, micro_batch, rank=rank, world_size=world_size)
            batches.append([batch["labels"].shape for batch in loader])
            for batch in loader:
                with torch.no_grad():
                    loss_sum += model(**batch, num_items_in_batch=1).loss.item()
                targets += count_targets(batch)
        assert len({len(shapes) for shapes in batches}) == 1
        return loss_sum / targets, targets

    loss, targets = held_out(world_size)
    assert targets == plain.report().answer_tokens
    assert loss == pytest.approx(held_out(1)[0], abs=1e-5)
    if examples == 1:
        alone = model(input_ids=plain[0]["input_ids"][None], labels=plain[0]["labels"][None]).loss.item()
        assert loss == pytest.approx(alone, abs=1e-5)
