"""Full fine-tuning's parameter groups: what is updated at once is a decoder layer."""

import torch

from losia_dist import LoSiAAdamW
from losia_dist.optim.dense_groups import dense_parameter_groups
from tests.support.models import tiny_llama


def test_a_group_for_each_layer_and_for_each_module_outside_of_them():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in dense_parameter_groups(model, lr=1e-3, weight_decay=0.1)]
    assert [group[0] for group in groups] == ["model.embed_tokens.weight", *(g[0] for g in groups[1:4]), "lm_head.weight"]
    for layer, group in enumerate(groups[1:4]):
        assert len(group) == 9 and all(name.startswith(f"model.layers.{layer}.") for name in group)


def test_the_update_copies_one_layers_gradients_at_a_time(monkeypatch):
    model = tiny_llama().to(torch.bfloat16)
    optimizer = LoSiAAdamW(dense_parameter_groups(model, lr=1e-3), lr=1e-3)
    copies = []
    step_group = LoSiAAdamW._step_group

    def watched(self, group, parameters):
        copies.append(sum(p.numel() for p in parameters))
        step_group(self, group, parameters)

    monkeypatch.setattr(LoSiAAdamW, "_step_group", watched)
    model(input_ids=torch.arange(8).unsqueeze(0), labels=torch.arange(8).unsqueeze(0)).loss.backward()
    optimizer.step()
    assert sum(copies) == sum(p.numel() for p in model.parameters())
    assert max(copies) == sum(p.numel() for p in model.model.layers[0].parameters()) < sum(copies) / 3
