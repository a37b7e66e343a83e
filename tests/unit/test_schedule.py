"""The script's schedule is that of Transformers, step by step."""

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from losia_dist.recipe.schedule import cosine_schedule


@pytest.mark.parametrize("warmup, steps, least", [(0, 10, 0.1), (3, 12, 0.0), (5, 6, 1.0), (1, 2, 0.5)])
def test_it_is_that_of_transformers(warmup, steps, least):
    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler, found = make(optimizer), []
        for _ in range(steps + 3):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    theirs = rates(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, warmup, steps, min_lr_rate=least))
    assert rates(lambda o: cosine_schedule(o, warmup, steps, least)) == pytest.approx(theirs, abs=1e-12)
