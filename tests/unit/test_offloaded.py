"""Activations that wait on the host: the same gradients, and what is kept is a copy of each layer's input."""

import pytest
import torch

from losia_dist.errors import ConfigError
from losia_dist.recipe import offloaded
from losia_dist.recipe.offloaded import offload_checkpoints
from tests.support.models import tiny_llama


def gradients(model):
    tokens = torch.arange(24).view(2, 12)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return [p.grad for p in model.parameters()]


def test_it_gives_the_same_gradients_and_keeps_one_input_a_layer(monkeypatch):
    expected = gradients(tiny_llama().train())
    model = tiny_llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert offload_checkpoints(model) == 3
    kept = []
    pack = offloaded._pack

    def counted(tensor):
        packed = pack(tensor)
        kept.append(packed[1].shape if isinstance(packed, tuple) else None)
        return packed

    monkeypatch.setattr(offloaded, "_pack", counted)
    model.model.embed_tokens.weight.requires_grad_(True)
    found = gradients(model)
    assert [shape for shape in kept if shape is not None] == [torch.Size([2, 12, 36])] * 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_without_recomputation_there_is_nothing_to_offload():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no layer whose inside is recomputed"):
        offload_checkpoints(tiny_llama())
