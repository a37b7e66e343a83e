"""Which layers read the same input: seen in the first forward pass, by the values that they are called with."""

import math

import pytest
import torch
from torch import nn

from losia_dist import Located, LoSiAConfig, get_losia_model
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.input_readers import InputReaders

NAMES = ("q_proj", "k_proj", "o_proj", "v_proj")  # as the module has them, not as they are called


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(16, 16, bias=False))

    def forward(self, x):
        return self.o_proj(self.q_proj(x) + self.k_proj(x) * self.v_proj(x.clone()))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def watched(largest=lambda mine: mine, share_columns=True, model=None):
    torch.manual_seed(0)
    config = LoSiAConfig(rank_factor=0.5, target_modules=list(NAMES), selection=Located(share_columns=share_columns))
    model = get_losia_model(Decoder() if model is None else model, config)
    sites = find_sites(model)
    return model, sites, InputReaders(sites, share_columns, largest)


def names(families):
    return [[site.name.rpartition(".")[2][0] for site in family] for family in families]


def of_layer(sites, layer):
    return [site for site in sites if site.group_name == f"layers.{layer}"]


@pytest.mark.parametrize("kind", ["training", "inference", "autocast"])
def test_layers_that_are_called_with_equal_values_read_the_same_input(kind):
    """A copy of the input is the same too: autocast, and a compiler, give each layer its own."""
    model, sites, readers = watched()
    with torch.inference_mode(kind == "inference"), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model(torch.randn(3, 16))
    for layer in (0, 1):
        assert names(readers.families(of_layer(sites, layer))) == [["q", "k", "v"], ["o"]]


def test_what_later_passes_show_changes_nothing():
    model, sites, readers = watched()
    model(torch.randn(3, 16))
    model.layers[0].k_proj(torch.zeros(3, 16))
    assert names(readers.families(of_layer(sites, 0))) == [["q", "k", "v"], ["o"]]


def test_a_rank_that_saw_no_call_learns_it_from_the_others():
    told = []

    def largest(mine):
        told.append(mine.tolist())
        return torch.tensor([1, 2, 1, 2, 1, 2])  # what another rank saw of q and k, q and o, q and v, k and o, ...

    _, sites, readers = watched(largest)
    assert names(readers.families(of_layer(sites, 0))) == [["q", "k", "v"], ["o"]]
    assert told == [[0, 0, 0, 0, 0, 0]]


class Fed(nn.Module):
    """Calls layers in the order in which it is given their inputs; they are defined in the order of NAMES."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention()])

    def forward(self, inputs):
        for name, x in inputs.items():
            getattr(self.layers[0], f"{name}_proj")(x)


def families_of_ranks(*inputs_of_ranks):
    """What each rank finds, by the largest of what all of them have seen."""
    sent = []

    def on_a_rank(inputs, largest):
        model, sites, readers = watched(largest, model=Fed())
        model(inputs)
        return names(readers.families(sites))

    for inputs in inputs_of_ranks:
        on_a_rank(inputs, lambda mine: sent.append(mine) or mine)
    largest = torch.stack(sent).max(0).values
    found = [on_a_rank(inputs, lambda mine: largest.clone()) for inputs in inputs_of_ranks]
    assert all(one == found[0] for one in found)
    return found[0]


X, Y, ZEROS = torch.randn(3, 16), torch.randn(3, 16), torch.zeros(3, 16)
ALL = {"q": X, "k": X, "v": X, "o": Y}


@pytest.mark.parametrize("order", ["qkvo", "vqko", "oqkv"])
def test_layers_that_one_rank_saw_apart_are_apart_in_whatever_order_they_are_called(order):
    usual, by_accident = ({name: inputs[name] for name in order} for inputs in (ALL, dict.fromkeys("qkvo", ZEROS)))
    assert families_of_ranks(usual, by_accident) == [["q", "k", "v"], ["o"]]


@pytest.mark.parametrize("called", ["kvo", "k", "vo", "qo", ""])
def test_a_rank_that_called_some_layers_does_not_part_the_others(called):
    assert families_of_ranks(ALL, {name: ALL[name] for name in called}) == [["q", "k", "v"], ["o"]]


def test_ranks_whose_layers_were_called_in_another_order_agree():
    assert families_of_ranks(ALL, {name: ALL[name] for name in "vkqo"}) == [["q", "k", "v"], ["o"]]


def test_inputs_that_are_nan_at_the_same_places_are_equal():
    padded = X.clone()
    padded[0] = math.nan
    assert families_of_ranks({"q": padded, "k": padded.clone(), "v": X, "o": Y}) == [["q", "k"], ["o"], ["v"]]


def test_layers_that_no_rank_saw_called_share_with_those_of_their_width():
    _, sites, readers = watched()
    assert names(readers.families(of_layer(sites, 0))) == [["q", "k", "o", "v"]]


def test_an_expert_without_a_token_is_seen_at_its_next_call():
    model, sites, readers = watched()
    model(torch.randn(0, 16))
    model(torch.randn(3, 16))
    assert names(readers.families(of_layer(sites, 1))) == [["q", "k", "v"], ["o"]]


@pytest.mark.parametrize("failing", ["k_proj", "v_proj", "o_proj"])
def test_a_first_pass_that_fails_is_begun_anew(failing):
    """Layers before the failure were called with other tokens than those after it."""
    model, sites, readers = watched()
    handle = getattr(model.layers[1], failing).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(3, 16))
    handle.remove()
    model(torch.randn(3, 16))
    for layer in (0, 1):
        assert names(readers.families(of_layer(sites, layer))) == [["q", "k", "v"], ["o"]]
    assert all(site.input_sink is None for site in sites)


def test_without_shared_columns_nothing_is_watched_or_sent():
    def largest(mine):
        raise AssertionError("nothing is to be sent")

    _, sites, readers = watched(largest, share_columns=False)
    assert all(site.input_sink is None for site in sites)
    assert names(readers.families(of_layer(sites, 0))) == [["q"], ["k"], ["o"], ["v"]]


def test_layers_in_tiles_are_not_watched():
    _, sites, _ = watched()
    for site in sites:
        site.is_tiled, site.input_sink = True, None
    InputReaders(sites, True, lambda mine: mine)
    assert all(site.input_sink is None for site in sites)
