"""The pool of ranks itself: what a failing, hanging or dying rank looks like to a test."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support import pool
from tests.support.pool import RankError


def add_up(value):
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"no luck on {rank}")
    dist.barrier()


def fail_everywhere():
    raise KeyError(dist.get_rank())


def die(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    time.sleep(60)


def make_a_group():
    dist.all_reduce(torch.ones(1), group=dist.new_group([0, 1]))
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0


@pytest.mark.slow
def test_process_groups_of_finished_functions_leave_no_threads(ranks):
    (first, _), *_, (last, _) = [ranks(2, make_a_group) for _ in range(8)]
    assert last <= first + 4  # a group has about three


def test_results_come_in_rank_order(ranks):
    assert ranks(2, add_up, 10) == [(0, 21), (1, 21)]


@pytest.fixture
def little_grace(monkeypatch):
    monkeypatch.setattr(pool, "GRACE_SECONDS", 1.0)


def test_a_failing_rank_shows_its_traceback_and_does_not_keep_the_others_waiting(ranks, little_grace):
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 failed: ValueError: no luck on 1[\s\S]*in fail_on"):
        ranks(2, fail_on, 1)
    assert time.monotonic() - began < 20
    assert ranks(2, add_up, 0) == [(0, 1), (1, 1)]  # a new pool works


def test_errors_expects_every_rank_to_raise(ranks, little_grace):
    assert ranks.errors(2, fail_everywhere) == [("KeyError", "0"), ("KeyError", "1")]
    with pytest.raises(AssertionError, match=r"ranks \[0\] did not raise"):
        ranks.errors(2, fail_on, 1)
    with pytest.raises(AssertionError, match="no rank raised"):
        ranks.errors(2, add_up, 0)


def test_a_rank_that_dies_is_reported_with_its_exit_code(ranks, little_grace):
    with pytest.raises(RankError, match="rank 1 failed: Died: the process ended with exit code 7"):
        ranks(2, die, 1)
