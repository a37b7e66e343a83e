"""Ranks that share each sequence, in bf16: DeepSpeed's BF16_Optimizer (stage 0) and ZeRO, against one process in bf16."""

import pytest
import torch

from tests.support.sequences import Run, build, reference, train

RUN = Run(steps=10, accumulation=2, max_grad_norm=0.2, deepspeed={"bf16": {"enabled": True}})


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return float(sum(((first[name] - second[name]).double() ** 2).sum() for name in second) ** 0.5)


def shared(first: list, second: list) -> float:
    """The least share of a group's rows and columns, over all moves, that both runs chose."""
    shares = []
    for (_, _, ours), (_, _, theirs) in zip(first, second, strict=True):
        chosen = [torch.isin(a, b).float().mean() for name in theirs for a, b in zip(ours[name], theirs[name], strict=True)]
        shares.append(float(torch.stack(chosen).mean()))
    return min(shares)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_as_near_to_one_process_as_rounding_lets_it(ranks, stage):
    """No farther from it in its losses than one process in bf16 is from fp32, and by a fraction of what was learned."""
    exact = reference(RUN)
    (alone,) = ranks(1, train, RUN, stage, 1)
    rounding = max(abs(a - b) for a, b in zip(alone["losses"], exact["losses"], strict=True))
    begun = {name: weight.detach().bfloat16().float() for name, weight in build(RUN).named_parameters(remove_duplicate=False)}
    learned = distance(alone["weights"], begun)
    for result in ranks(2, train, RUN, stage, 2):
        apart = max(abs(a - b) for a, b in zip(result["losses"], alone["losses"], strict=True))
        assert 0 < apart <= rounding
        assert distance(result["weights"], alone["weights"]) < 0.1 * learned
        assert shared(result["history"], alone["history"]) > 0.9
        before_moving = (torch.tensor(run["norms"][: RUN.config["period"]]) for run in (result, alone))
        torch.testing.assert_close(*before_moving, rtol=0.01, atol=0)
