"""The script's quantizer: experts of a mixture in 4 bits as they are read from files, a weight at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from losia_dist import Drawn, LoSiAConfig, get_losia_model
from losia_dist.recipe.choice import EngineChoice
from losia_dist.recipe.environment import Process
from losia_dist.recipe.fsdp import Sharding
from losia_dist.recipe.quantization import quantization_arguments
from losia_dist.recipe.weights import quantized_experts
from losia_dist.recipe.weights.quantized_experts import four_bit_settings
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.four_bits import dequantize_4bit, quantize_4bit
from losia_dist.subnet.packed import packed_weights
from tests.support.cases import only
from tests.support.families import MIXTURES, tiny_model

FAMILIES = [name.removeprefix("mixture:") for name in MIXTURES]


def load(directory, form: str = "nf4"):
    settings = four_bit_settings(form, torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=settings, device_map={"": "cpu"}, dtype="float32"
    )


@pytest.mark.parametrize("family", only(["qwen3_moe", "gpt_oss"], FAMILIES))
def test_experts_of_each_family_are_quantized_and_have_the_values_of_their_codes(tmp_path, family):
    original = tiny_model(f"mixture:{family}")
    original.save_pretrained(tmp_path)
    model = get_losia_model(load(tmp_path), LoSiAConfig(rank_factor=0.25, selection=Drawn()))
    access, held = resolve_parameters(model), packed_weights(model)
    fused = {name for name, parameter in original.named_parameters() if parameter.ndim == 3 and ".experts." in name}
    assert fused and fused <= held.keys()
    for name in fused:
        values = original.get_parameter(name).data
        codes, state = quantize_4bit(values, "nf4", double=False)
        expected = dequantize_4bit(codes, state.absmax, 64, "nf4", tuple(values.shape), torch.float32)
        # Scales are quantized too, to 8 bits.
        torch.testing.assert_close(access.read_whole(held[name].weight), expected, rtol=0.05, atol=0.02)
        assert held[name].packed.describe()["double"]
        assert held[name].weight.nbytes == -(-values.numel() // 2)
    assert getattr(model.config, "quantization_config", None) is None


def test_no_two_weights_are_whole_at_a_time(tmp_path, monkeypatch):
    tiny_model("mixture:qwen3_moe").save_pretrained(tmp_path)
    whole: list[weakref.ref] = []

    def watched(values, *args, **settings):
        gc.collect()
        assert not [one for one in whole if one() is not None], "an earlier weight is still there in full"
        whole.append(weakref.ref(values))
        return quantize_4bit(values, *args, **settings)

    monkeypatch.setattr(quantized_experts, "quantize_4bit", watched)
    load(tmp_path, "fp4")
    assert len(whole) == 4


@pytest.mark.parametrize(
    "sharding, rank, world, device, keeps_codes",
    [
        (Sharding(None, True), 0, 4, "cpu", True),
        (Sharding(None, True), 1, 4, "cpu", False),
        (None, 1, 4, "cuda:1", True),
        (Sharding(None, True), 0, 1, "cuda:1", True),
    ],
)
def test_codes_wait_on_rank_0s_cpu_where_each_rank_will_keep_a_part(sharding, rank, world, device, keeps_codes):
    process = Process(rank, world, torch.device("cuda:1"))
    choice = EngineChoice(None, sharding, False, (), "bf16", "off")
    found = quantization_arguments("nf4", AutoConfig.for_model("llama"), choice, process)
    assert found["device_map"] == {"": torch.device(device)}
    assert found["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    assert found["quantization_config"].keeps_codes == keeps_codes


@pytest.mark.parametrize("keeps_codes", [True, False])
def test_a_rank_that_keeps_no_codes_holds_scales_and_what_is_not_quantized(tmp_path, keeps_codes):
    """Of a model whose codes outweigh all else."""
    sizes = {"moe_intermediate_size": 64, "hidden_size": 64, "num_experts": 8, "num_hidden_layers": 12, "head_dim": 16}
    tiny_model("qwen3_moe", **sizes).save_pretrained(tmp_path)
    settings = four_bit_settings("nf4", torch.float32, keeps_codes=keeps_codes)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, device_map={"": "cpu"}, dtype="float32"
    )
    get_losia_model(model, LoSiAConfig(rank_factor=0.25, selection=Drawn()))
    held = packed_weights(model).values()
    assert all(one.weight.is_meta != keeps_codes for one in held)
    scales = sum(scale.nbytes for one in held for scale in one.packed.scales())
    codes = sum(one.weight.nbytes for one in held)
    here = sum(0 if p.is_meta else p.nbytes for p in model.parameters())
    others = sum(p.nbytes for p in model.parameters() if not p.requires_grad) - codes
    assert scales > 0 and not any(scale.is_meta for one in held for scale in one.packed.scales())
    assert (here >= others + codes) == keeps_codes and (here == others) != keeps_codes
