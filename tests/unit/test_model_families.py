"""What "all-linear" stands for in each kind of model, and what it refuses to leave frozen in silence."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.subnet.linear import SubnetConv1D, SubnetLinear
from tests.support.families import COMMON, EXPERT_FAMILIES, FAMILIES, VOCABULARY, tiny_llava, tiny_model

LAYER = {
    "phi": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"],
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}
LLAMA_LAYER = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_sites(model)]


def refusal(model: nn.Module, **settings) -> str:
    """The message that a model is refused with; it must be left as it was."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError) as caught:
        get_losia_model(model, LoSiAConfig(**settings))
    assert not find_sites(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_finds_every_layer_of_a_family_grouped_by_decoder_layer(family):
    model = get_losia_model(tiny_model(family), LoSiAConfig(rank_factor=0.25))
    body = "transformer.h" if family == "gpt2" else "model.layers"
    expected = {f"{body}.{place}.{part}" for place in range(2) for part in LAYER.get(family, LLAMA_LAYER)}
    assert set(names(model)) == expected
    assert group_names(find_sites(model)) == [f"{body}.0", f"{body}.1"]


@pytest.mark.parametrize(
    "targets, per_layer", [(["c_attn"], 1), (["mlp.c_proj", "c_fc"], 2), (r"transformer\.h\.\d+\.mlp.*", 2)]
)
def test_names_and_expressions_find_conv1d_layers_too(targets, per_layer):
    model = get_losia_model(tiny_model("gpt2"), LoSiAConfig(rank_factor=0.25, target_modules=targets))
    assert len(names(model)) == 2 * per_layer


def test_rows_of_a_conv1d_are_its_output_neurons():
    model = tiny_model("gpt2")
    stored = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    get_losia_model(model, LoSiAConfig(rank_factor=(0.5, 0.25)))
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, SubnetConv1D) and layer.weight.shape == (36, 108)
    assert layer.subnet.shape == (54, 9) and layer.row_index.max() >= 36 > layer.col_index.max()
    assert torch.equal(layer.subnet.data, stored.t()[layer.row_index][:, layer.col_index])
    assert layer.subnet.is_contiguous() and "subnet=54x9" in repr(layer)


@pytest.mark.parametrize("localizing", [False, True])
@pytest.mark.parametrize("factor", [0.25, (0.25, 1), (1, 0.25), 1])
def test_gradients_of_a_conv1d_are_the_dense_ones_cut_to_the_subnet(factor, localizing):
    torch.manual_seed(0)
    dense = Conv1D(24, 32)
    layer = get_losia_model(nn.ModuleList([Conv1D(24, 32)]), LoSiAConfig(rank_factor=factor))[0]
    with torch.no_grad():
        layer.weight.copy_(dense.weight)
        layer.bias.copy_(dense.bias.normal_())
        layer.subnet.normal_()
        dense.weight.t()[layer.row_index[:, None], layer.col_index] = layer.subnet
    seen = []
    if localizing:
        layer.site.gradient_sink = lambda gradient, weight: seen.append((gradient.clone(), weight.clone()))
    x = torch.randn(2, 5, 32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, y = dense(a), layer(b)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    expected.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(layer.subnet.grad, dense.weight.grad.t()[layer.row_index][:, layer.col_index])
    if localizing:
        torch.testing.assert_close(seen[0][0], dense.weight.grad.t())
        torch.testing.assert_close(seen[0][1], dense.weight.t())


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_all_linear_takes_the_experts_and_leaves_the_routers_frozen(family):
    model = get_losia_model(tiny_model(family), LoSiAConfig(rank_factor=0.25))
    parts = {name.split(".", 3)[3] for name in names(model)}
    shared = {f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")} if family == "qwen2_moe" else set()
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert parts == {f"self_attn.{part}_proj" for part in "qkvo"} | experts | shared
    assert not any(
        p.requires_grad for name, p in model.named_parameters() if name.endswith(("gate.weight", "expert_gate.weight"))
    )


@pytest.mark.parametrize("wanted", [["experts.down_proj"], r".*\.experts\.down_proj"])
def test_names_and_expressions_mean_experts_too(wanted):
    model = get_losia_model(tiny_model("mixtral"), LoSiAConfig(rank_factor=0.25, target_modules=wanted))
    assert set(names(model)) == {f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)}


def test_a_list_that_means_half_of_the_experts_is_told(caplog):
    get_losia_model(tiny_model("mixtral"), LoSiAConfig(rank_factor=0.25, target_modules=["q_proj", "down_proj"]))
    assert "trains model.layers.0.mlp.experts.down_proj" in caplog.text and "experts.gate_up_proj" in caplog.text


def test_experts_that_are_not_there_are_named_with_the_nearest():
    with pytest.raises(ConfigError, match="no module is named 'experts.up_proj'. Nearest: .*gate_up_proj"):
        get_losia_model(tiny_model("mixtral"), LoSiAConfig(rank_factor=0.25, target_modules=["experts.up_proj"]))


class ListOfExperts(nn.Module):
    """Experts as modules of their own, as older code has them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(16, 16)}) for _ in range(2))
        self.q_proj = nn.Linear(16, 16)


def test_experts_that_are_modules_of_their_own_train_as_linear_layers():
    model = get_losia_model(ListOfExperts(), LoSiAConfig(rank_factor=0.25))
    assert set(names(model)) == {"experts.0.w1", "experts.1.w1", "q_proj"}


def test_of_a_vision_language_model_all_linear_takes_the_language_model():
    model = get_losia_model(tiny_llava(), LoSiAConfig(rank_factor=0.25))
    assert len(names(model)) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names(model))


@pytest.mark.parametrize(
    "targets, expected",
    [
        (r".*vision_tower.*\.(fc1|fc2)", ["vision_tower"]),
        (["multi_modal_projector.linear_1", "down_proj"], ["multi_modal_projector", "language_model"]),
    ],
)
def test_its_other_parts_train_when_they_are_named(targets, expected):
    model = get_losia_model(tiny_llava(), LoSiAConfig(rank_factor=0.25, target_modules=targets))
    assert {name.split(".")[1] for name in names(model)} == set(expected)


def test_a_vision_language_model_trains_on_images_and_text():
    config = LoSiAConfig(rank_factor=0.25, period=2)
    model = get_losia_model(tiny_llava(), config).train()
    vision = [p.detach().clone() for p in model.model.vision_tower.parameters()]
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=3e-3), lr=3e-3)
    losia = LoSiA(model, optimizer, config)
    text = torch.randint(0, VOCABULARY - 1, (2, 8))
    tokens = torch.cat([torch.full((2, 4), VOCABULARY - 1), text], 1)  # four patches an image
    labels = torch.cat([torch.full((2, 4), -100), text], 1)
    pixels = torch.randn(2, 3, 8, 8)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(a, b) for a, b in zip(vision, model.model.vision_tower.parameters(), strict=True))


class Parts(nn.Module):
    """A model of two parts that names neither as its decoder."""

    class Config:
        def get_text_config(self):
            return object()

    def __init__(self):
        super().__init__()
        self.config, self.one, self.other = self.Config(), nn.Linear(16, 16), nn.Linear(16, 16)

    def get_decoder(self):
        return self


def test_a_model_of_several_parts_without_a_language_model_must_be_told_what_to_train():
    assert "Parts has several parts" in refusal(Parts())
    assert names(get_losia_model(Parts(), LoSiAConfig(target_modules=["one"]))) == ["one"]


def classifier(labels: int) -> nn.Module:
    config = AutoConfig.for_model("llama", **{**COMMON, "pad_token_id": 0}, num_labels=labels)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("labels", [2, 40])
def test_a_new_head_is_trained_in_full_or_left_frozen_on_purpose(labels):
    assert "Add modules_to_save=['score']" in refusal(classifier(labels))
    model = get_losia_model(classifier(labels), LoSiAConfig(modules_to_save=["score"]))
    assert model.score.weight.requires_grad and not isinstance(model.score, SubnetLinear)
    assert len(names(model)) == 14


def test_all_linear_leaves_out_what_trains_in_full():
    model = get_losia_model(tiny_model("llama"), LoSiAConfig(modules_to_save=["model.layers.1.mlp"]))
    assert not any(name.startswith("model.layers.1.mlp.") for name in names(model))
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Labelled(nn.Linear):
    def label(self) -> str:
        return f"{self.in_features} to {self.out_features}"


def with_replaced_forward() -> nn.Linear:
    linear = nn.Linear(16, 16)
    linear.forward = lambda input: input
    return linear


@pytest.mark.parametrize(
    "odd, reason",
    [
        (lambda: Doubled(16, 16), "computes by a forward of its own (Doubled)"),
        (with_replaced_forward, "has its forward replaced on the object"),
        (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), "computes its weight from other tensors"),
        (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), "computes its weight from other tensors"),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["odd"]])
def test_a_layer_that_would_not_use_its_subnet_is_refused(odd, reason, targets):
    model = nn.ModuleDict({"plain": nn.Linear(16, 16), "odd": odd()})
    assert f"'odd' {reason}" in refusal(model, target_modules=targets)


def test_a_subclass_that_computes_like_a_linear_layer_keeps_its_methods():
    model = get_losia_model(nn.ModuleDict({"odd": Labelled(32, 16)}), LoSiAConfig())
    assert isinstance(model["odd"], SubnetLinear) and model["odd"].label() == "32 to 16"
    assert model["odd"].subnet.shape == (2, 4)


def test_linear_layers_that_share_a_weight_are_refused():
    model = nn.ModuleDict({"up": nn.Linear(16, 16), "down": nn.Linear(16, 16)})
    model["down"].weight = model["up"].weight
    message = refusal(model)
    assert "the weight of 'up' is shared with 'down' (Linear)" in message and "give it a weight of its own" in message


class RawEmbedding(nn.Embedding):
    def forward(self, input):
        return self.weight[input]


def test_a_tied_embedding_that_reads_its_weight_directly_is_refused():
    model = tiny_model("llama", tie_word_embeddings=True)
    embedding = RawEmbedding(VOCABULARY, 36)
    model.set_input_embeddings(embedding)
    model.lm_head.weight = embedding.weight
    assert "'model.embed_tokens' (RawEmbedding)" in refusal(model, output_rank_factor=0.25)
    assert len(names(get_losia_model(model, LoSiAConfig()))) == 14


class Twice(nn.Module):
    """One layer under two names, run twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(20, 20)
        self.second = self.first

    def forward(self, x, y):
        return type("Output", (), {"loss": (self.second(torch.tanh(self.first(x))) - y).square().mean()})


@pytest.mark.parametrize("targets", ["all-linear", ["second"]])
def test_a_layer_used_twice_is_one_target_and_trains_as_the_dense_reference_does(targets):
    from tests.reference.dense import DenseLoSiA

    config = LoSiAConfig(rank_factor=0.25, period=2, target_modules=targets)
    model = get_losia_model(Twice(), config)
    (layer,) = find_sites(model)
    weight, places = "first.weight", (layer.row_index.clone(), layer.col_index.clone())
    reference = Twice()
    dense = DenseLoSiA(reference, [[weight]], {weight: places}, period=2, lr_schedule=lambda step: 1e-2)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    losia = LoSiA(model, optimizer, config)
    for _ in range(6):
        batch = {"x": torch.randn(8, 20), "y": torch.randn(8, 20)}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        assert dense.step([batch]) == pytest.approx(loss.item(), abs=1e-5)
    losia.consolidate()
    torch.testing.assert_close(layer.weight.detach(), reference.first.weight.detach(), atol=1e-5, rtol=0)
    assert torch.equal(layer.row_index, dense.subnets[weight][0]) and torch.equal(layer.col_index, dense.subnets[weight][1])
