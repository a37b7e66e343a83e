"""Nothing is ever silently inactive: what a run is stopped for, and with which words."""

import pytest
import torch
from torch import nn

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, load_checkpoint, losia_parameter_groups, save_checkpoint
from losia_dist.errors import ConfigError, DivergenceError, EngagementError, UnsupportedError
from losia_dist.ranks.fingerprint import fingerprint


class TwoBranches(nn.Module):
    """`unused` exists but is never called."""

    def __init__(self, use_both: bool) -> None:
        super().__init__()
        self.used, self.unused, self.use_both = nn.Linear(8, 8), nn.Linear(8, 8), use_both

    def forward(self, x):
        return self.used(x) + (self.unused(x) if self.use_both else 0)


def train_once(model, lr=1e-2, optimizer=None, config=None, loss=lambda y: y.square().sum()):
    config = config or LoSiAConfig(rank_factor=0.5, period=1)
    get_losia_model(model, config)
    groups = losia_parameter_groups(model, lr=lr)
    optimizer = optimizer(groups) if optimizer else LoSiAAdamW(groups, lr=lr)
    losia = LoSiA(model, optimizer, config)
    loss(model(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))).backward()
    optimizer.step()
    losia.step()
    return losia


def test_a_healthy_model_passes():
    assert train_once(TwoBranches(use_both=True)).steps == 1


def test_a_subnet_without_a_gradient_is_an_error_that_names_it():
    with pytest.raises(EngagementError, match=r"no gradient reached the subnets of unused in the first step"):
        train_once(TwoBranches(use_both=False))


def steps_of(model, losses, lr=1e-2, optimizer=LoSiAAdamW, **config):
    """The conductor after one step for each loss."""
    config = LoSiAConfig(**{"rank_factor": 0.5, "period": 100, **config})
    get_losia_model(model, config)
    optimizer = optimizer(losia_parameter_groups(model, lr=lr), lr=lr)
    losia = LoSiA(model, optimizer, config)
    go_on(losia, losses)
    return losia


def go_on(losia, losses):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for loss in losses:
        loss(losia.model(x)).backward()
        losia.state.optimizer.step()
        losia.step()
        losia.state.optimizer.zero_grad()


def no_signal(y):
    return (y * 0).sum()


def signal(y):
    return y.square().sum()


def test_a_gradient_of_zeros_waits_and_is_said(caplog):
    losia = steps_of(TwoBranches(use_both=True), [no_signal, signal])
    assert losia.progress()["engaged"]
    assert [r.message for r in caplog.records if "exact zeros (used, unused)" in r.message]


def test_zeros_for_ever_are_looked_at_ever_more_rarely(caplog):
    losia = steps_of(TwoBranches(use_both=True), [no_signal] * 9)
    assert not losia.progress()["engaged"]
    assert len([r for r in caplog.records if "exact zeros" in r.message]) == 4  # after steps 1, 2, 4 and 8


def test_a_subnet_that_moves_while_it_waits_is_not_taken_for_one_that_trained():
    class Held(LoSiAAdamW):  # changes nothing, and passes for Adam, which is not tried
        keeps_adam_state = True

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = 0.1

    with pytest.raises(EngagementError, match="of used, unused received a gradient but did not change"):
        steps_of(
            TwoBranches(use_both=True), [no_signal, no_signal, no_signal, signal], optimizer=Held, period=1, selection="random"
        )


def test_a_layer_that_never_gets_a_gradient_is_an_error_though_others_wait():
    with pytest.raises(EngagementError, match="no gradient reached the subnets of unused in"):
        steps_of(TwoBranches(use_both=False), [no_signal])


def test_a_step_too_small_to_change_anything_is_an_error_that_names_the_subnets():
    with pytest.raises(EngagementError, match=r"of used, unused received a gradient but did not change"):
        train_once(TwoBranches(use_both=True), lr=1e-30)


def test_a_bf16_subnet_under_an_optimizer_without_masters_does_not_pass_unseen():
    torch.manual_seed(0)
    with pytest.raises(EngagementError, match="use LoSiAAdamW, which keeps fp32 master values"):
        model = TwoBranches(use_both=True).to(torch.bfloat16)
        config = LoSiAConfig(rank_factor=0.5, period=1)
        get_losia_model(model, config)
        optimizer = torch.optim.AdamW(losia_parameter_groups(model, lr=1e-9), lr=1e-9)
        losia = LoSiA(model, optimizer, config)
        model(torch.randn(4, 8).bfloat16()).square().sum().backward()
        optimizer.step()
        losia.step()


def test_a_first_step_with_learning_rate_zero_waits_for_the_second():
    model, config = TwoBranches(use_both=False), LoSiAConfig(rank_factor=0.5, period=5)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    losia = LoSiA(model, optimizer, config)
    for step in range(2):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        if step == 0:
            losia.step()
        else:
            with pytest.raises(EngagementError, match="unused"):
                losia.step()
        scheduler.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("config", [{"selection": "random"}, {"period": 2}])
def test_a_step_with_a_gradient_that_is_not_finite_ends_the_run(config, value):
    with pytest.raises(DivergenceError, match="gradients of used, unused were infinite or not a number in step 2"):
        steps_of(TwoBranches(use_both=True), [signal, lambda y: y.sum() * value], **config)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.NAdam, torch.optim.Adafactor])
def test_other_optimizers_are_watched_too(optimizer):
    with pytest.raises(DivergenceError, match="in step 2"):
        steps_of(TwoBranches(use_both=True), [signal, lambda y: y.sum() * float("nan")], optimizer=optimizer)


def test_a_step_that_is_not_finite_is_never_consolidated_or_saved(tmp_path):
    losia = steps_of(TwoBranches(use_both=True), [signal])
    optimizer, model = losia.state.optimizer, losia.model
    parts = {"model": model, "optimizer": optimizer, "losia": losia}
    save_checkpoint(tmp_path, **parts)
    losia._finite._device = torch.device("cuda")  # as on a GPU, where a step's flags are read one step later
    losia._finite._agree = lambda step, copies_changed: (step, torch.tensor([1, 1, copies_changed]), None)
    signal(model(torch.randn(4, 8))).backward()
    optimizer.step()
    losia.step()
    with pytest.raises(DivergenceError, match="in step 2; nothing has been saved"):
        save_checkpoint(tmp_path, **parts)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_what_such_a_step_left_is_not_saved_by_a_caller_who_goes_on_until_other_values_are_loaded(tmp_path):
    losia = steps_of(TwoBranches(use_both=True), [signal])
    parts = {"model": losia.model, "optimizer": losia.state.optimizer, "losia": losia}
    save_checkpoint(tmp_path, **parts)
    losia.model(torch.randn(4, 8)).sum().mul(float("nan")).backward()
    losia.state.optimizer.step()
    for told in (losia.consolidate, losia.step, losia.consolidate):  # before step(), and once the error was caught
        with pytest.raises(DivergenceError, match="in step 2; nothing has been saved"):
            told()
    losia.state.optimizer.zero_grad()
    losia.discard_step()
    load_checkpoint(tmp_path, **parts)
    go_on(losia, [signal])
    losia.consolidate()
    assert losia.steps == 2 and losia.sites[0].weight.isfinite().all()


def test_gradients_whose_squares_overflow_are_finite():
    def huge(y):
        return y.sum() * 1e25

    def sgd(groups, lr):
        return torch.optim.SGD(groups)

    assert steps_of(TwoBranches(use_both=True), [huge, huge], lr=1e-27, optimizer=sgd, selection="random").steps == 2


def test_gradients_that_are_not_finite_outside_the_subnets_stop_the_run_where_subnets_would_be_chosen_from_them():
    model, config = TwoBranches(use_both=True), LoSiAConfig(rank_factor=0.5, period=2)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    losia = LoSiA(model, optimizer, config)
    outside = next(row for row in range(8) if row not in model.used.row_index and row not in model.unused.row_index)
    with pytest.raises(DivergenceError, match="importance of used is not finite"):
        for step in range(2):
            y = model(torch.randn(4, 8))
            (y.square().sum() + y[:, outside].sum() * (float("inf") if step else 1.0)).backward()
            optimizer.step()
            losia.step()


def test_a_slot_without_signal_leaves_a_subnet_where_it_is_and_says_so(caplog):
    losia = steps_of(TwoBranches(use_both=True), [signal], period=1, layers_per_slot=2)
    assert not [r for r in caplog.records if "keep the one" in r.message]
    places = [(layer.row_index.tolist(), layer.col_index.tolist()) for layer in losia.sites]
    assert [0, 1, 2, 3] not in [rows for rows, _ in places]
    go_on(losia, [no_signal, no_signal])
    assert places == [(layer.row_index.tolist(), layer.col_index.tolist()) for layer in losia.sites]
    assert (
        len([r for r in caplog.records if "used had no gradient other than zero" in r.message]) == 4
    )  # a group is a layer here


def test_fp16_is_refused_with_the_fix():
    model, config = TwoBranches(use_both=True).half(), LoSiAConfig(rank_factor=0.5)
    get_losia_model(model, config)
    with pytest.raises(UnsupportedError, match="used is in fp16.*bf16 or fp32"):
        LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-2)), config)


def test_fp16_by_autocast_is_refused_where_it_trains():
    model = get_losia_model(TwoBranches(use_both=True), LoSiAConfig(rank_factor=0.5))
    with torch.autocast("cpu", torch.float16):
        with torch.no_grad():
            model(torch.randn(4, 8))
        with pytest.raises(UnsupportedError, match="under autocast in fp16.*use bf16"):
            model(torch.randn(4, 8))


def test_an_optimizer_without_a_group_per_layer_is_refused_with_the_fix():
    model, config = TwoBranches(use_both=True), LoSiAConfig(rank_factor=0.5)
    get_losia_model(model, config)
    with pytest.raises(ConfigError, match="losia_parameter_groups"):
        LoSiA(model, LoSiAAdamW(p for p in model.parameters() if p.requires_grad), config)


def test_an_optimizer_of_another_model_is_refused():
    config = LoSiAConfig(rank_factor=0.5)
    model, other = (get_losia_model(TwoBranches(use_both=True), config) for _ in range(2))
    with pytest.raises(ConfigError, match="does not hold the subnets of this model"):
        LoSiA(model, LoSiAAdamW(losia_parameter_groups(other, lr=1e-2)), config)


def test_an_unconverted_model_is_refused():
    model = TwoBranches(use_both=True)
    with pytest.raises(ConfigError, match="call get_losia_model"):
        losia_parameter_groups(model, lr=1e-2)
    with pytest.raises(ConfigError, match="call get_losia_model"):
        LoSiA(model, torch.optim.SGD(model.parameters()), LoSiAConfig())


def test_a_call_without_an_optimizer_step_changes_nothing():
    losia = train_once(TwoBranches(use_both=True), config=LoSiAConfig(rank_factor=0.5, period=3))
    assert losia.step() is False
    assert losia.steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_fingerprint_tells_any_change_of_one_number_and_any_exchange_of_two(dtype):
    values = torch.arange(1, 31).view(5, 6).to(dtype)
    original, seen = fingerprint(values), {fingerprint(values).item()}
    for place in range(30):
        changed = values.clone()
        bits = changed.view(-1).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
        bits[place] ^= 1
        seen.add(fingerprint(changed).item())
        exchanged = values.clone().view(-1)
        exchanged[[place, (place + 7) % 30]] = exchanged[[(place + 7) % 30, place]]
        assert fingerprint(exchanged) != original
    assert len(seen) == 31


def test_a_fingerprint_is_a_copys_too_and_changes_nothing(monkeypatch):
    for values in (torch.randperm(1000), torch.randn(1000)):
        before = values.clone()
        whole = fingerprint(values)
        assert torch.equal(values, before)
        assert fingerprint(values.view(10, 100).t().contiguous().t()) == whole
        monkeypatch.setattr("losia_dist.ranks.fingerprint._PIECE", 37)  # as a large tensor, piece by piece
        assert fingerprint(values) == whole
        monkeypatch.undo()
