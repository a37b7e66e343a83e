"""LoSiAAdamW: the arithmetic of torch's AdamW, fp32 masters for bf16 values, and rewarming under any scheduler."""

import pytest
import torch

from losia_dist import LoSiAAdamW
from losia_dist.errors import ConfigError
from losia_dist.optim.rewarming import Rewarming


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_equal_torch_adamw(weight_decay):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": weight_decay}
    a, b = LoSiAAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_bf16_parameter_moves_by_steps_smaller_than_its_resolution():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = LoSiAAdamW([p], lr=1e-4)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["master"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[p]["master"], torch.full((4,), 0.99), rtol=1e-4, atol=0)
    torch.testing.assert_close(p.detach().float(), torch.full((4,), 0.99), rtol=4e-3, atol=0)


def test_state_made_early_is_the_state_of_the_first_step():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LoSiAAdamW([p])
    optimizer.create_state()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[p]["step"].item() == 0


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -0.1}])
def test_settings_that_cannot_work_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LoSiAAdamW([torch.nn.Parameter(torch.ones(1))], **setting)


SCHEDULERS = {
    "cosine, chainable": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-4),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=21),
    "exponential, from the present rate": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "transformers linear": lambda o: __import__("transformers").get_linear_schedule_with_warmup(o, 3, 20),
    "transformers wsd": lambda o: __import__("transformers").get_wsd_schedule(o, 3, 5, num_stable_steps=12),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_rewarming_multiplies_any_schedule_and_leaves_it_undisturbed(make):
    def optimizer_of(parameter):
        groups = [{"params": [parameter], "losia_group": "layer", "lr": 1e-2}]
        return torch.optim.SGD(groups, lr=1e-2)

    plain, ramped = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a, b = optimizer_of(plain), optimizer_of(ramped)
    ramp = 0.25
    rewarming = Rewarming(b, lambda name: ramp if name == "layer" else 1.0)
    schedule_a, schedule_b = make(a), make(b)
    for _ in range(20):
        moved = []
        for p, optimizer, schedule in ((plain, a, schedule_a), (ramped, b, schedule_b)):
            before = p.item()
            p.grad = torch.ones(1)
            optimizer.step()
            schedule.step()
            moved.append(before - p.item())
        assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]
        assert moved[1] == pytest.approx(ramp * moved[0], rel=1e-3, abs=1e-8)
    assert rewarming.stepped
