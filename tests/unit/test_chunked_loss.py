"""The loss without all logits at once: the same numbers as the model's own loss, in less memory."""

import argparse
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.loss import use_chunked_loss
from losia_dist.recipe.options import add_training_arguments, check
from tests.support.families import FAMILIES, tiny_model
from tests.support.models import tiny_llama

VOCABULARY = 97
HEADS = {
    "frozen": ({}, {}),
    "frozen, tied": ({"tie_word_embeddings": True}, {}),
    "subnet": ({}, {"output_rank_factor": 0.25}),
    "subnet of all rows": ({}, {"output_rank_factor": 1.0}),
    "subnet, tied": ({"tie_word_embeddings": True}, {"output_rank_factor": 0.25}),
    "trained in full": ({}, {"modules_to_save": ["lm_head"]}),
}


def a_batch(rows=3, length=11):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[-1] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def pair(head="subnet", chunk=5, dtype=torch.float32):
    """A converted model, and its twin with a chunked loss."""
    settings, config = HEADS[head]
    plain = get_losia_model(tiny_llama(**settings).to(dtype).train(), LoSiAConfig(rank_factor=0.25, **config))
    return plain, use_chunked_loss(copy.deepcopy(plain), chunk)


def gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, expected, tolerance=1e-5):
    assert torch.allclose(ours[0], expected[0], atol=tolerance, rtol=tolerance)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = max(1.0, gradient.abs().max().item())
        assert (ours[1][name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("chunk", [1, 5, 33, 1000])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_equal_the_models_own(head, chunk):
    plain, chunked = pair(head, chunk)
    assert_same(gradients(chunked, **a_batch()), gradients(plain, **a_batch()))


@pytest.mark.parametrize("given", [7, torch.tensor(7.0)], ids=["number", "tensor"])
def test_the_number_of_targets_and_the_ignored_label_can_be_given(given):
    plain, chunked = pair()
    extra = {"num_items_in_batch": given, "ignore_index": 5}
    batch = a_batch()
    batch["labels"] = batch["labels"].clamp(min=5)
    assert_same(gradients(chunked, **batch, **extra), gradients(plain, **batch, **extra))
    shifted = {"shift_labels": batch["labels"].flip(1), **extra}
    assert_same(gradients(chunked, **batch, **shifted), gradients(plain, **batch, **shifted))


@pytest.mark.parametrize("head", ["frozen", "subnet", "trained in full"])
def test_under_autocast_and_in_bf16_the_loss_is_computed_in_fp32(head):
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        plain, chunked = pair(head, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, ours = plain(**a_batch()).loss, chunked(**a_batch()).loss
        assert ours.dtype == expected.dtype == torch.float32
        assert torch.allclose(ours, expected, rtol=1e-6)
        # Outside of the autocast region, as loops do it.
        ours.backward()
        expected.backward()
        for mine, theirs in zip(chunked.parameters(), plain.parameters(), strict=True):
            if theirs.requires_grad:
                assert mine.grad.dtype == theirs.grad.dtype
                assert (mine.grad - theirs.grad).norm() <= 0.02 * theirs.grad.norm()


def test_backward_recomputes_in_the_dtype_of_forward_also_outside_of_autocast():
    _, chunked = pair("subnet", 5)
    seen = []
    chunked.lm_head.rule = lambda logits: seen.append(logits.dtype) or logits
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked(**a_batch()).loss
    loss.backward()
    assert seen == [torch.bfloat16] * 14  # 33 tokens: seven chunks, twice


def test_gradients_of_many_bf16_chunks_are_not_added_in_bf16():
    plain, chunked = pair("subnet of all rows", 1, torch.bfloat16)
    batch = a_batch(rows=16, length=16)
    _, ours = gradients(chunked, **batch)
    _, expected = gradients(plain, **batch)
    name = "lm_head.subnet"
    error = (ours[name].float() - expected[name].float()).norm() / expected[name].float().norm()
    assert error < 0.004, error


@pytest.mark.parametrize(
    "family, settings",
    [
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("gpt2", {}),
        ("phi", {}),  # a bias in the output layer
        ("mixtral", {"num_local_experts": 4}),
        ("opt", {"word_embed_proj_dim": 36, "ffn_dim": 77, "dropout": 0.0}),
    ],
)
def test_families_that_scale_or_cap_their_logits(family, settings, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES.get(family, {}), **settings})
    plain = tiny_model(family).train()
    chunked = use_chunked_loss(copy.deepcopy(plain), 7)
    assert_same(gradients(chunked, **a_batch()), gradients(plain, **a_batch()))


def test_a_model_whose_loss_is_another_is_refused_and_left_as_it_was(monkeypatch):
    monkeypatch.setitem(FAMILIES, "falcon_h1", {"lm_head_multiplier": 0.3})
    model = tiny_model("falcon_h1")
    kind = type(model.lm_head)
    with pytest.raises(UnsupportedError, match="FalconH1ForCausalLM does more to its inputs, its logits or its loss"):
        use_chunked_loss(model, 7)
    assert type(model.lm_head) is kind and "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    with pytest.raises(UnsupportedError, match="load-balancing loss"):
        use_chunked_loss(tiny_model("mixtral", output_router_logits=True))
    model = use_chunked_loss(tiny_model("mixtral"))
    with pytest.raises(UnsupportedError, match="output_router_logits=True"):
        model(**a_batch(), output_router_logits=True)
    model = tiny_llama()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    with pytest.raises(UnsupportedError, match="loss function of its own"):
        use_chunked_loss(model)
    with pytest.raises(ConfigError, match="no causal language model"):
        use_chunked_loss(torch.nn.Linear(3, 3))


def test_wrong_uses_are_refused():
    for chunk in (0, -3, 2.5, True):
        with pytest.raises(ConfigError, match="give a number of tokens"):
            use_chunked_loss(tiny_llama(), chunk)
    model = use_chunked_loss(tiny_llama(), 4)
    with pytest.raises(ConfigError, match="ask for it once"):
        use_chunked_loss(model, 4)
    with pytest.raises(ConfigError, match="logits_to_keep together with labels"):
        model(**a_batch(), logits_to_keep=2)
    model.set_output_embeddings(torch.nn.Linear(36, VOCABULARY, bias=False))
    with pytest.raises(ConfigError, match="exchanged after use_chunked_loss"):
        model(**a_batch())


def test_without_labels_and_in_evaluation_nothing_else_changes():
    plain, chunked = pair()
    ids = a_batch()["input_ids"]
    assert torch.equal(chunked(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(*(m.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (chunked, plain)))
    with torch.no_grad():
        ours, expected = (m(**a_batch(), num_items_in_batch=1, output_hidden_states=True) for m in (chunked, plain))
    assert torch.allclose(ours.loss, expected.loss) and ours.logits is None
    assert torch.equal(ours.hidden_states[-1], expected.hidden_states[-1])
    loss, *_ = chunked(**a_batch(), return_dict=False)
    assert torch.allclose(loss, plain(**a_batch()).loss)
    assert chunked.state_dict().keys() == plain.state_dict().keys()


def test_a_copy_of_the_model_trains_its_own_weights():
    settings, config = HEADS["subnet"]
    chunked = use_chunked_loss(get_losia_model(tiny_llama(**settings), LoSiAConfig(rank_factor=0.25, **config)), 5)
    twin = copy.deepcopy(chunked)
    with torch.no_grad():
        for p in chunked.parameters():
            p.zero_()
    assert torch.isfinite(twin(**a_batch()).loss) and twin(**a_batch()).loss != chunked(**a_batch()).loss


class _Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_more_than_one_chunk_of_logits_exists_forward_and_backward():
    model = use_chunked_loss(get_losia_model(tiny_llama(vocab_size=5000), LoSiAConfig(rank_factor=0.25)), 8)
    with _Largest() as seen:
        gradients(model, **a_batch(rows=4, length=20))
    assert seen.elements == 5000 * 36  # a view of the weight; 80 tokens of logits would be 400,000, eight are 40,000


def test_the_output_layer_sees_one_gradient_a_micro_batch():
    """Chunks do not count as micro-batches: the importance, and so the chosen subnet, is the unchunked run's."""
    runs = []
    for model in pair():
        config = LoSiAConfig(rank_factor=0.25, output_rank_factor=0.25, period=2, layers_per_slot=4)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
        losia = LoSiA(model, optimizer, config)
        calls = []
        sink = model.lm_head.site.gradient_sink
        model.lm_head.site.gradient_sink = lambda *args, sink=sink, calls=calls: (calls.append(args[0].dtype), sink(*args))
        for _ in range(2):
            for start in (0, 1):
                model(**{k: v if k == "use_cache" else v[start : start + 2] for k, v in a_batch().items()}).loss.backward()
            optimizer.step()
            losia.step()
            optimizer.zero_grad()
        assert calls == [torch.float32] * 4
        runs.append((model.lm_head.row_index.clone(), model.lm_head.subnet.detach().clone()))
        losia.detach()
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.allclose(runs[0][1], runs[1][1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["frozen", "subnet"])
def test_torch_compile_gives_the_same_gradients(head):
    plain, chunked = pair(head)
    loss, expected = gradients(plain, **a_batch())
    config = LoSiAConfig(rank_factor=0.25, **HEADS[head][1])
    losia = LoSiA(chunked, LoSiAAdamW(losia_parameter_groups(chunked, lr=1e-3)), config)
    torch._dynamo.reset()
    ours = gradients(torch.compile(chunked, backend="aot_eager"), **a_batch())
    losia.detach()
    assert_same(ours, (loss, {f"_orig_mod.{name}": gradient for name, gradient in expected.items()}))


def options_of(*words):
    parser = add_training_arguments(argparse.ArgumentParser())
    return parser.parse_args(["--model", "m", "--train_file", "f", "--output_dir", "o", *words])


def test_the_scripts_options_are_checked():
    check(options_of("--loss", "chunked", "--loss_chunk", "512"))
    with pytest.raises(ConfigError, match="--loss_chunk has no effect without --loss chunked"):
        check(options_of("--loss_chunk", "512"))
    with pytest.raises(ConfigError, match="--loss_chunk 0: at least 1"):
        check(options_of("--loss", "chunked", "--loss_chunk", "0"))


def test_the_removed_loss_names_the_one_to_use(capsys):
    with pytest.raises(SystemExit):
        options_of("--loss", "liger")
    assert "liger was removed" in (said := capsys.readouterr().err) and "use chunked" in said
