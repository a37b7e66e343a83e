"""Ranks that die, stop, fail or leave: the others end soon, with a message that names the rank. Real processes throughout."""

import json
import signal
import socket
import sys
import threading

import pytest
import torch.distributed as dist

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError
from losia_dist.ranks.watch.heartbeat import Hub, Spoke
from losia_dist.ranks.watch.liveness import EXIT_CODE, Limits, read_limits
from tests.support.models import tiny_llama
from tests.support.watched import PATIENCE, run

SOON = PATIENCE + 18  # seconds on a busy machine; the process groups themselves would wait for 1,800


def assert_ended(ranks, but, *words, within=SOON):
    """Every rank but one has ended with an error, in time, and says these words."""
    for rank, ended in enumerate(ranks):
        if rank != but:
            assert ended.code in (1, EXIT_CODE, -signal.SIGALRM), ended.text
            assert ended.seconds < within, f"{ended.seconds:.1f} s\n{ended.text}"
            for word in words:
                assert word in ended.text, ended.text


def test_a_killed_rank_ends_the_others_at_once_and_is_named():
    ranks = run(2, "ddp", "kill-1")
    assert ranks[1].code == -9
    assert_ended(ranks, 1, "losia_dist: rank 1 (host ", "ended without a word", "out of memory?")


@pytest.mark.slow
def test_so_does_a_killed_first_rank_which_hosts_the_rendezvous_and_the_watch():
    ranks = run(3, "ddp", "kill-0")
    assert ranks[0].code == -9
    assert_ended(ranks, 0, "losia_dist: rank 0 (host ", "ended without a word")


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_a_stopped_rank_ends_the_others_after_the_patience(place):
    ranks = run(2, "ddp", f"stop-{place}")
    assert_ended(ranks, place, f"losia_dist: rank {place} (host ", "has been silent for")
    assert ranks[1 - place].code == EXIT_CODE


def test_a_rank_that_raises_is_named_with_its_error_and_prints_its_own_traceback():
    ranks = run(2, "ddp", "raise-1")
    assert ranks[1].code == 1 and "in _trouble" in ranks[1].text and "ValueError: a bad sample" in ranks[1].text
    assert_ended(ranks, 1, "losia_dist: rank 1 (host ", "failed: ValueError: a bad sample")


def test_a_rank_with_fewer_batches_ends_the_others_instead_of_keeping_them_waiting():
    ranks = run(2, "ddp", "early-1")
    assert ranks[1].code == 0
    assert_ended(ranks, 1, "left after step 3, while rank 0 is in step 4", "give every rank the same number of batches")


@pytest.mark.slow
def test_so_does_one_that_is_done_and_lives_on():
    ranks = run(2, "ddp", "detached-0")
    assert ranks[0].code == 0
    assert_ended(ranks, 0, "losia_dist: rank 0 (host ", "left after step 3, while rank 1 is in step 4")


@pytest.mark.slow
def test_a_rank_may_take_its_time_in_a_step_and_may_work_on_alone_after_the_last():
    ranks = run(2, "ddp", "patient-1")  # rank 0, the hub, has ended long before rank 1 is through
    assert [ended.code for ended in ranks] == [0, 0] and "SOLO WORK DONE" in ranks[1].text
    for ended in ranks:
        assert "losia_dist" not in ended.text and "Warning" not in ended.text, ended.text


@pytest.mark.slow
def test_a_normal_end_makes_no_noise():
    for ended in run(3, "ddp", "none"):
        assert ended.code == 0 and ended.text.strip() == "TRAINED"


@pytest.mark.slow
def test_a_deadlocked_rank_is_waited_for_until_the_limit_that_was_set():
    ranks = run(2, "ddp", "deadlock-1", LOSIA_LIVENESS_STALL="3")
    assert_ended(ranks, None, "no rank has moved on for", "The ranks in step 4 wait for rank 1 (host ", "still after step 3")


@pytest.mark.slow
def test_with_the_default_patience_every_trouble_is_over_within_a_minute():
    for trouble, place in (("stop-1", 1), ("kill-0", 0), ("early-1", 1)):
        assert_ended(run(2, "ddp", trouble, timeout=100, LOSIA_LIVENESS_PATIENCE=""), place, f"rank {place}", within=60)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("trouble", ["kill-1", "stop-0", "raise-1", "early-1"])
def test_the_same_under_deepspeed(engine, trouble):
    place = int(trouble[-1])
    assert_ended(run(2, engine, trouble, timeout=120), place, f"losia_dist: rank {place} (host ", within=SOON + 5)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Limits(30.0, None)),
        ({"LOSIA_LIVENESS": "0"}, None),
        ({"LOSIA_LIVENESS": "1", "LOSIA_LIVENESS_PATIENCE": "90", "LOSIA_LIVENESS_STALL": "1800"}, Limits(90.0, 1800.0)),
    ],
)
def test_the_environment_sets_the_limits(environment, expected):
    assert read_limits(environment) == expected


@pytest.mark.parametrize(
    "name, value", [("LOSIA_LIVENESS", "no"), ("LOSIA_LIVENESS_PATIENCE", "0"), ("LOSIA_LIVENESS_STALL", "ten")]
)
def test_a_bad_value_is_refused_with_its_rule(name, value):
    with pytest.raises(ConfigError, match=f"{name}='{value}' must be"):
        read_limits({name: value})


def conductor():
    model, config = tiny_llama(), LoSiAConfig(rank_factor=0.25)
    get_losia_model(model, config)
    return LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config, watch=True)


def differ_in_patience():
    import os

    if dist.get_rank() == 1:
        os.environ["LOSIA_LIVENESS_PATIENCE"] = "77"
    try:
        conductor()
    finally:
        os.environ.pop("LOSIA_LIVENESS_PATIENCE", None)


def test_settings_that_differ_over_the_ranks_stop_them_all(ranks):
    for kind, message in ranks.errors(2, differ_in_patience):
        assert kind == "ConfigError"
        assert "LOSIA_LIVENESS_PATIENCE is '' on rank 0 and '77' on rank 1" in message


def several_conductors():
    before_hook = sys.excepthook
    first, second = conductor(), conductor()
    threads = [losia._watch._thread for losia in (first, second)]
    hooked = sys.excepthook is not before_hook
    dist.barrier()
    first.detach()
    first.detach()
    kept = threads[1].is_alive() and second._watch.running
    dist.barrier()
    second.detach()
    for thread in threads:
        thread.join(10)
    again = conductor()
    renewed = again._watch.running
    dist.barrier()
    again.detach()
    return hooked, kept, any(thread.is_alive() for thread in threads), renewed


def test_each_conductor_has_a_thread_which_ends_with_it(ranks):
    for result in ranks.fresh(2, several_conductors):  # no conductor of another test is left there
        assert result == (True, True, False, True)


def unwatched():
    hook, threads = sys.excepthook, set(threading.enumerate())  # one of an earlier function may end meanwhile
    model, config = tiny_llama(), LoSiAConfig(rank_factor=0.25)
    get_losia_model(model, config)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    is_as_before = sys.excepthook is hook and set(threading.enumerate()) <= threads
    return is_as_before, len(model._forward_pre_hooks), losia.steps


def test_a_loop_that_does_not_ask_is_not_watched(ranks):
    assert ranks(2, unwatched) == [(True, 0, 0)] * 2


def only_one_asks():
    model, config = tiny_llama(), LoSiAConfig(rank_factor=0.25)
    get_losia_model(model, config)
    LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config, watch=dist.get_rank() == 0)


def test_one_rank_that_asks_alone_stops_them_all(ranks):
    for kind, message in ranks.errors(2, only_one_asks):
        assert kind == "ConfigError" and "watch is True on rank 0 and False on rank 1" in message


def test_one_rank_alone_has_nothing_to_watch():
    losia = conductor()
    assert losia._watch is None
    losia.detach()


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("losia_dist.ranks.watch.heartbeat._own_addresses", lambda: ["127.0.0.1"])
    hub = Hub()
    yield hub
    hub.close()


def hear(end, seconds=2.0):
    return end.wait(seconds)


def test_a_stranger_is_not_listened_to(hub):
    guess = b'{"kind": "hello", "token": "guess", "rank": 1}\n{"kind": "failed", "text": "x"}\n'
    for said in (guess, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", hub.invitation.port)) as stranger:
            stranger.sendall(said)
            assert [event for _ in range(4) for event in hear(hub, 0.2)] == []
            stranger.settimeout(2)
            assert stranger.recv(100) == b""  # hung up
    assert hub.connected == 0


def test_messages_reach_the_other_end_whole_and_its_end_is_told(hub):
    import threading

    heard = []
    listener = threading.Thread(target=lambda: [heard.extend(hear(hub, 0.2)) for _ in range(10)])
    listener.start()
    spoke = Spoke(hub.invitation, {"rank": 5}, 0, 5.0)
    spoke.send({"kind": "beat", "text": "x" * 20_000})
    spoke.send({"kind": "left"})
    listener.join()
    assert [rank for rank, _ in heard] == [5, 5, 5] and [message["kind"] for _, message in heard] == ["hello", "beat", "left"]
    assert len(json.dumps(heard[1][1])) > 20_000
    hub.send({"kind": "end", "text": "over"})
    assert hear(spoke) == [(0, {"kind": "end", "text": "over"})]
    spoke.close()
    assert hear(hub) == [(5, None)]


def test_a_hub_that_cannot_be_reached_is_said_so_with_its_addresses(hub):
    from dataclasses import replace

    with pytest.raises(OSError, match=r"127\.0\.0\.1: .*refused"):
        Spoke(replace(hub.invitation, port=1), {"rank": 1}, 0, 1.0)
