"""The layer: outputs and gradients of a dense one, a fraction of its memory, autocast, and checkpoints of both kinds."""

import copy

import pytest
import torch
from torch import nn

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.subnet.convert import find_sites
from tests.support.models import tiny_llama


def layer_pair(factor=0.25, m=24, n=32, bias=True):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(n, m, bias=bias))
    converted = get_losia_model(copy.deepcopy(dense), LoSiAConfig(rank_factor=factor))
    return dense[0], converted[0]


@pytest.mark.parametrize("factor", [0.25, (0.25, 1), (1, 0.25), 1])
@pytest.mark.parametrize("localizing", [False, True])
def test_gradients_are_the_dense_layers_own_cut_to_the_subnet(factor, localizing):
    dense, layer = layer_pair(factor)
    seen = []
    if localizing:
        layer.site.gradient_sink = lambda gradient, weight: seen.append((gradient.clone(), weight.clone()))
    with torch.no_grad():  # a subnet that has moved since it was cut out
        layer.subnet.add_(0.5)
        dense.weight[layer.row_index[:, None], layer.col_index] += 0.5
    x = torch.randn(2, 5, 32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, y = dense(a), layer(b)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    expected.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(layer.subnet.grad, dense.weight.grad[layer.row_index][:, layer.col_index])
    assert layer.weight.grad is None
    if localizing:
        torch.testing.assert_close(seen[0][0], dense.weight.grad)
        torch.testing.assert_close(seen[0][1], dense.weight)


def test_backward_is_right_after_an_engine_emptied_and_refilled_the_weight():
    _, layer = layer_pair()
    with torch.no_grad():
        layer.subnet.add_(1.0)
    base = layer.weight.detach().clone()
    x = torch.randn(4, 32, requires_grad=True)
    y = layer(x)
    expected = layer.weight.detach().clone()
    layer.weight.data.copy_(base)  # what a sharded engine gathers again: its shards never saw the subnet
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(4, -1))


def test_the_importance_sees_the_present_subnet_even_where_the_input_needs_no_gradient():
    _, layer = layer_pair()
    seen = []
    layer.site.gradient_sink = lambda gradient, weight: seen.append(weight.clone())
    with torch.no_grad():
        layer.subnet.add_(1.0)
    base = layer.weight.detach().clone()
    y = layer(torch.randn(4, 32))  # the first decoder layer's input: the embedding is frozen
    expected = layer.weight.detach().clone()
    layer.weight.data.copy_(base)
    y.sum().backward()
    assert torch.equal(seen[0], expected)


def saved_bytes(run) -> int:
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # kept alive until the count is done
    assert output is not None
    return sum(seen.values())


@pytest.mark.parametrize("factor, share", [(0.25, 0.25), ((0.5, 0.125), 0.125)])
def test_a_layer_that_does_not_localize_saves_p_of_its_input(factor, share):
    _, layer = layer_pair(factor, bias=False)
    x = torch.randn(64, 32)
    input_bytes = x.numel() * x.element_size()
    assert saved_bytes(lambda: layer(x * 1)) == share * input_bytes
    layer.site.gradient_sink = lambda gradient, weight: None
    assert saved_bytes(lambda: layer(x * 1)) == input_bytes


def test_autocast_computes_in_its_dtype_as_a_dense_layer_does():
    dense, layer = layer_pair()
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), dense(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.subnet.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    def run(checkpointing: bool):
        model = tiny_llama()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        config = LoSiAConfig(rank_factor=0.25, period=2)
        get_losia_model(model, config).train()
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
        losia = LoSiA(model, optimizer, config)
        tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(5):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losia.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, [layer.subnet.detach() for layer in find_sites(model)]

    losses, subnets = run(False)
    checkpointed_losses, checkpointed_subnets = run(True)
    assert losses == pytest.approx(checkpointed_losses, abs=1e-6)
    for a, b in zip(subnets, checkpointed_subnets, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
