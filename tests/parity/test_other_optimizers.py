"""Optimizers whose state is not Adam's two moments: a subnet that moves begins as a new parameter does, or they are refused."""

import logging
import sys

import pytest
import torch

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import UnsupportedError
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.models import tiny_llama
from tests.support.training import Run, reference, train, variant

RUN = Run(steps=12, max_grad_norm=0.5, config={"rank_factor": 0.25, "period": 2, "rewarm_steps": 0})


@pytest.mark.parametrize(
    "engine, optimizer",
    [
        ("one", "NAdam"),  # keeps a product of its momenta, which begins at 1
        ("one", "Adafactor"),  # a number a row and a column
        slow("one", "Rprop"),  # step sizes, which begin at the learning rate
        ("one", "SGD"),
        slow("ddp", "NAdam"),
        slow("fsdp2", "NAdam"),
        slow("zero1", "RMSprop"),
        ("zero2", "NAdam"),
        slow("zero3", "NAdam"),
    ],
)
def test_a_subnet_begins_anew_as_in_the_reference(ranks, engine, optimizer):
    run = variant(RUN, optimizer=optimizer)
    expected = reference(run)
    for result in [train(engine, run)] if engine == "one" else ranks(2, train, engine, run):
        assert_same_run(result, expected)


def begin(optimizer, **config) -> LoSiA:
    config = LoSiAConfig(**{"rank_factor": 0.25, **config})
    model = get_losia_model(tiny_llama(hidden_size=96, intermediate_size=256), config)
    return LoSiA(model, optimizer(losia_parameter_groups(model, lr=1e-3)), config)


def test_what_is_tried_leaves_optimizer_and_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    made = []

    def nadam(groups):
        made.append(torch.optim.NAdam(groups))
        torch.optim.lr_scheduler.LambdaLR(made[0], lambda step: 0.0)  # a warmup: the rate is 0 by now
        torch.manual_seed(3)
        return made[0]

    begin(nadam)
    assert torch.equal(torch.rand(3), expected)
    assert not made[0].state and all(group["lr"] == 0 for group in made[0].param_groups)


class CountsInItsGroup(torch.optim.SGD):
    """As apex's FusedAdam and schedule-free optimizers do: steps of all parameters together."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] / group["steps"] * p.grad


class MakesStateAtOnce(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["sum"] += p.grad


class KeepsAnObject(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["projector"] = object()


class AdamWithMore(LoSiAAdamW):
    """Of a class that is known, but not known itself."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["code"] = torch.zeros(p.shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (CountsInItsGroup, "keeps something of a tensor outside its state"),
        (MakesStateAtOnce, "did not begin anew once its state was taken away: KeyError: 'sum'"),
        (KeepsAnObject, "keeps 'projector', a object, which a checkpoint does not hold"),
        (AdamWithMore, "keeps quantized state .'code' is a Tensor of torch.uint8"),
    ],
)
def test_an_optimizer_that_cannot_be_cleared_is_refused_with_what_was_seen(optimizer, message):
    with pytest.raises(UnsupportedError, match=f"{optimizer.__name__}.*{message}.*Use LoSiAAdamW"):
        begin(optimizer)


class KeepsItsOwnRate(torch.optim.SGD):
    """As Adafactor with relative_step."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= 1e-3 * p.grad


def test_a_rate_that_an_optimizer_does_not_follow_is_refused():
    with pytest.raises(UnsupportedError, match="KeepsItsOwnRate makes the same step whatever .* rewarming would do nothing"):
        begin(KeepsItsOwnRate)


class Lookahead(torch.optim.Optimizer):
    """Goes back half the way every few steps, to copies of its own: in a subnet that has moved they are old values."""

    def __init__(self, groups):
        self.optimizer = torch.optim.AdamW(groups)
        super().__init__(self.optimizer.param_groups, {})


def test_an_optimizer_around_another_is_refused():
    with pytest.raises(UnsupportedError, match="Lookahead steps through another optimizer, AdamW, and what it keeps"):
        begin(Lookahead)


def test_what_the_configuration_keeps_must_be_known():
    with pytest.raises(UnsupportedError, match="reset_bias_correction=False keeps Adam's step count, and .*NAdam has 'step'"):
        begin(torch.optim.NAdam, reset_bias_correction=False)
    begin(torch.optim.AdamW, reset_bias_correction=False)


@pytest.mark.parametrize("name", ["bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit", "torchao.optim.AdamW4bit"])
def test_quantized_state_is_refused(name):
    logging.getLogger("torchao").setLevel(logging.ERROR)
    package, kind = name.split(".")[0], name.rsplit(".", 1)[-1]
    pytest.importorskip(package)
    optimizer = getattr(sys.modules.get(f"{package}.optim") or __import__(f"{package}.optim", fromlist=["optim"]), kind)
    with pytest.raises(UnsupportedError, match=f"{kind} keeps quantized state"):
        begin(optimizer, output_rank_factor=0.5)


def begin_with_adafactor(engine: str) -> None:
    train(engine, variant(RUN, optimizer="Adafactor"))


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_less_than_a_number_per_weight_is_refused_where_state_is_cut(ranks, engine):
    for kind, message in ranks.errors(2, begin_with_adafactor, engine):
        assert kind == "UnsupportedError" and "keeps 'row_var' of shape" in message
