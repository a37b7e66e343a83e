"""State dicts and converted models: a plain one would leave subnets of before in the weights that it brings."""

import pytest
import torch

from losia_dist import LoSiAConfig, get_losia_model
from losia_dist.errors import UnsupportedError
from tests.support.families import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_plain_state_dict_is_refused_by_a_converted_model(family):
    plain = tiny_model(family).state_dict()
    model = get_losia_model(tiny_model(family), LoSiAConfig(rank_factor=0.25))
    with pytest.raises(UnsupportedError, match="Load weights before get_losia_model"):
        model.load_state_dict(plain, strict=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_its_own_state_dict_and_that_of_a_part_without_subnets_load(family):
    model, other = (get_losia_model(tiny_model(family), LoSiAConfig(rank_factor=0.25, seed=seed)) for seed in (0, 1))
    ids = torch.arange(24).reshape(2, 12)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits)
    norm = {"model.norm.weight": torch.full_like(model.model.norm.weight, 2.0)}
    model.load_state_dict(norm, strict=False)
    assert torch.equal(model.model.norm.weight, norm["model.norm.weight"])
