"""Which layers read the same input: seen in the first forward pass, by the values that they are called with."""

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


def watched(largest=lambda mine: mine, share_columns=True):
    torch.manual_seed(0)
    config = LoSiAConfig(rank_factor=0.5, target_modules=list(NAMES), selection=Located(share_columns=share_columns))
    model = get_losia_model(Decoder(), config)
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
        return torch.tensor([0, 0, 2, 0])  # what another rank saw

    _, sites, readers = watched(largest)
    assert names(readers.families(of_layer(sites, 0))) == [["q", "k", "v"], ["o"]]
    assert told == [[-1, -1, -1, -1]]


def test_layers_that_no_rank_saw_called_share_with_those_of_their_width():
    _, sites, readers = watched()
    assert names(readers.families(of_layer(sites, 0))) == [["q", "k", "o", "v"]]


def test_an_expert_without_a_token_is_seen_at_its_next_call():
    model, sites, readers = watched()
    model(torch.randn(0, 16))
    model(torch.randn(3, 16))
    assert names(readers.families(of_layer(sites, 1))) == [["q", "k", "v"], ["o"]]


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
