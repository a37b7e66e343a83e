"""Subnets of layers with one input: they take the same columns, gather them once and keep them once."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from losia_dist import Drawn, Located, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import CheckpointError, ConfigError
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.models import tiny_llama
from tests.support.training import Run, global_batches

SHARED = {"rank_factor": (1.0, 0.25), "period": 2, "layers_per_slot": 1, "selection": Drawn()}
OWN = {**SHARED, "selection": Drawn(share_columns=False)}
LOCATED = {**SHARED, "selection": Located()}
LOCATED_SHARED = {**SHARED, "selection": Located(share_columns=True)}


class Gathers(TorchDispatchMode):
    """Counts gathers of columns."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.gather.default
        return function(*args, **(kwargs or {}))


def made(config, model=None):
    config = LoSiAConfig(**config)
    model = get_losia_model((tiny_llama() if model is None else model).train(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    return model, optimizer, LoSiA(model, optimizer, config)


def step(model, optimizer, losia):
    """One step; the gathers of its forward, and the bytes of subnets' inputs that it kept for backward."""
    tokens = torch.arange(24).view(2, 12) % 40
    kept = {}
    small = {site.subnet_shape[1] for site in losia.sites}

    def pack(tensor):
        if tensor.dim() == 3 and tensor.shape[-1] in small:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Gathers() as gathers:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losia.step()
    return gathers.count, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def columns(losia):
    return {site.name.removeprefix("model.layers."): site.col_index.tolist() for site in losia.sites}


def test_layers_of_one_input_have_the_same_columns_and_rows_of_their_own():
    _, _, losia = made({**SHARED, "rank_factor": 0.25})
    found = columns(losia)
    rows = {site.name.removeprefix("model.layers."): site.row_index.tolist() for site in losia.sites}
    assert found["0.self_attn.q_proj"] == found["0.self_attn.k_proj"] == found["0.self_attn.v_proj"]
    assert found["0.mlp.gate_proj"] == found["0.mlp.up_proj"] != found["0.self_attn.q_proj"]
    assert found["0.self_attn.q_proj"] != found["1.self_attn.q_proj"]
    assert rows["0.mlp.gate_proj"] != rows["0.mlp.up_proj"]


def test_each_step_gathers_and_keeps_them_once_also_after_moves():
    shared, own = made(SHARED), made(OWN)
    layers = len({site.group_name for site in shared[2].sites})
    before = columns(shared[2])
    for _ in range(6):  # three slots
        gathers, kept = step(*shared)
        gathers_apart, kept_apart = step(*own)
        assert gathers == 4 * layers and gathers_apart == 7 * layers
        width = next(site.subnet_shape[1] for site in shared[2].sites if site.name.endswith("q_proj"))
        assert kept_apart - kept == layers * 24 * 3 * width * 4  # k, v and up: tokens x columns x bytes
    assert all(before[name] != now for name, now in columns(shared[2]).items())


def test_located_layers_gather_and_keep_them_once_too_but_while_they_localize():
    shared, own = made(LOCATED_SHARED), made(LOCATED)
    layers = len({site.group_name for site in shared[2].sites})
    first = columns(shared[2])
    for _ in range(8):  # every layer moves, and the first one again
        gathers, kept = step(*shared)
        gathers_apart, kept_apart = step(*own)
        assert gathers == 4 * (layers - 1) and gathers_apart == 7 * (layers - 1)
        width = next(site.subnet_shape[1] for site in shared[2].sites if site.name.endswith("q_proj"))
        assert kept_apart - kept == (layers - 1) * 24 * 3 * width * 4  # k, v and up: tokens x columns x bytes
    assert all(first[name] != now for name, now in columns(shared[2]).items())


def test_steps_that_take_no_importance_gather_them_once_in_every_layer():
    located = made({**SHARED, "selection": Located(share_columns=True, importance_steps=1)})
    layers = len({site.group_name for site in located[2].sites})
    assert [step(*located)[0] for _ in range(4)] == [4 * layers, 4 * (layers - 1)] * 2


def test_what_layers_read_is_watched_once_and_not_held():
    model, _, losia = made(LOCATED_SHARED)
    watched = {site.name.rpartition(".")[2] for site in losia.sites if site.input_sink is not None}
    assert watched == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    step(model, _, losia)
    assert all(site.input_sink is None for site in losia.sites) and not losia._readers._latest
    *_, before_a_step = made(LOCATED_SHARED)
    before_a_step.detach()
    assert all(site.input_sink is None for site in before_a_step.sites)


def gathers_of(engine):
    """Gathers of one forward under an engine, after a group was located, and its decoder layers."""
    run = Run(steps=1, config={**LOCATED_SHARED, "period": 1, "layers_per_slot": 4, "output_rank_factor": 0.25})
    losia, stepper, close = runs.start(engine, run)
    runs.train_on(losia, stepper, run, 1)
    for site in losia.sites:
        site.gradient_sink = None  # as in a step that takes no importance
    with Gathers() as gathers:
        losia.model(**global_batches(run)[0][0], use_cache=False)
    close()
    return gathers.count, len({site.group_name for site in losia.sites if not site.is_output})


@pytest.mark.parametrize("engine", ["zero3", slow("fsdp2")])
def test_engines_that_wrap_what_enters_a_layer_share_too(ranks, engine):
    for count, layers in ranks(2, gathers_of, engine):
        assert count == 4 * layers


class Attention(nn.Module):
    """To what an encoder gave: q reads another tensor than k and v."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(16, 16, bias=False))

    def forward(self, x, given):
        return self.q_proj(x) * self.k_proj(given) * self.v_proj(given)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x, given):
        return self.layers[1](self.layers[0](x, given), given).square().sum()


def test_layers_that_share_columns_with_others_than_the_first_gather_them_once_too():
    targets = ["q_proj", "k_proj", "v_proj"]
    located = {**LOCATED_SHARED, "rank_factor": 0.25, "target_modules": targets, "period": 1, "layers_per_slot": 2}
    torch.manual_seed(0)
    model, optimizer, losia = made(located, Attending())
    x, given = torch.randn(3, 16), torch.randn(3, 16)
    for _ in range(2):
        model(x, given).backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
    found = {site.name: site.col_index.tolist() for site in losia.sites}
    assert found["layers.0.q_proj"] != found["layers.0.k_proj"] == found["layers.0.v_proj"]
    for site in losia.sites:
        site.gradient_sink = None  # as in a step that takes no importance
    with Gathers() as gathers:
        loss = model(x, given)
    assert gathers.count == 2 * 2
    loss.backward()
    taken = {site.name: site.subnet.grad for site in losia.sites}
    optimizer.zero_grad()
    losia.detach()  # each gathers for itself
    model(x, given).backward()
    for site in losia.sites:
        assert torch.equal(site.subnet.grad, taken[site.name]), site.name


def test_nothing_is_shared_by_located_subnets_or_after_detach():
    located = made(LOCATED)
    layers = len({site.group_name for site in located[2].sites})
    assert step(*located)[0] == 7 * (layers - 1)  # one localizes, and keeps all of x
    shared = made(SHARED)
    shared[2].detach()
    tokens = torch.arange(24).view(2, 12) % 40
    with Gathers() as gathers:
        shared[0](input_ids=tokens, labels=tokens, use_cache=False)
    assert gathers.count == 7 * layers


def test_evaluation_gathers_nothing():
    model, _, _ = made(SHARED)
    with torch.no_grad(), Gathers() as gathers:
        model.eval()(input_ids=torch.arange(12).view(1, 12))
    assert gathers.count == 0


class Block(nn.Module):
    """Two readers of one tensor, which changes in between."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.q_proj, self.k_proj = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        q = self.q_proj(x)
        with torch.no_grad():
            x = x.add_(1.0) if self.in_place else x + 1.0
        return (q * self.k_proj(x)).sum()


class Decoder(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.layers = nn.ModuleList([Block(in_place)])

    def forward(self, x):
        return self.layers[0](x)


def test_an_input_that_changed_between_two_readers_is_not_taken_for_the_same():
    torch.manual_seed(0)
    plain, changing = Decoder(in_place=False), Decoder(in_place=True)
    changing.load_state_dict(plain.state_dict())
    config = {**SHARED, "rank_factor": (1.0, 0.5), "target_modules": ["q_proj", "k_proj"]}
    model, _, losia = made(config, changing)
    x = torch.randn(3, 16)
    model(x.clone()).backward()
    plain(x.clone()).backward()
    for site in losia.sites:
        dense = plain.get_submodule(site.name).weight.grad
        torch.testing.assert_close(site.subnet.grad, dense[:, site.col_index])


def test_columns_that_were_changed_by_hand_are_not_taken_for_shared():
    model, _, losia = made(SHARED)
    site = next(site for site in losia.sites if site.name.endswith("k_proj"))
    with torch.no_grad():
        free = sorted(set(range(site.shape[1])) - set(site.col_index.tolist()))
        site.col_index.copy_(torch.tensor(free[: site.col_index.numel()]))
    tokens = torch.arange(24).view(2, 12) % 40
    with Gathers() as gathers:
        model(input_ids=tokens, labels=tokens, use_cache=False)
    layers = len({one.group_name for one in losia.sites})
    assert gathers.count == 4 * layers + 1


def test_a_value_that_is_no_truth_value_is_refused():
    with pytest.raises(ConfigError, match=r"share_columns='yes': true or false is needed"):
        Drawn(share_columns="yes")


def test_a_checkpoint_that_knows_of_no_shared_columns_goes_on_without_them(tmp_path, monkeypatch):
    own, shared = (Run(steps=4, config={**config, "rank_factor": 0.25, "seed": 5}) for config in (OWN, SHARED))
    with runs.saving_without(monkeypatch, "drawn", "share_columns"):
        undisturbed = runs.train_and_save("one", own, tmp_path, (3,))
    with pytest.raises(CheckpointError, match="was saved with share_columns=False, and this run has share_columns=True"):
        runs.resume("one", shared, tmp_path, 3)
    runs.assert_equal(runs.resume("one", own, tmp_path, 3), undisturbed)
