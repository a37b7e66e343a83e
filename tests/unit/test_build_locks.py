"""Locks of torch's extension loader: whose writer is gone they are removed, and nobody waits for one without a word."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from torch.utils import cpp_extension

from losia_dist.ranks import build_locks
from losia_dist.ranks.build_locks import GuardedBaton, stale_locks

here = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "op").mkdir()
    return tmp_path / "op"


def hold(folder, held, seconds=60.0):
    baton = GuardedBaton(str(folder / "lock"))
    baton.try_acquire()
    held.set()
    time.sleep(seconds)
    baton.release()


@pytest.fixture
def holding(folder):
    """Starts a process that holds the folder's lock, as a rank of this package does."""
    processes = []

    def start(seconds=60.0):
        held = here.Event()
        processes.append(here.Process(target=hold, args=(folder, held, seconds)))
        processes[-1].start()
        assert held.wait(30)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def sees_everybody(monkeypatch):
    """As on a machine's own disk, outside containers; the tests may run in one."""
    monkeypatch.setattr(build_locks, "_sees_everybody", lambda lock: True)


def plain(code, **where):
    """A process without this package."""
    process = subprocess.Popen(
        [sys.executable, "-c", code + "; print('ready', flush=True); import time; time.sleep(60)"],
        stdout=subprocess.PIPE,
        **where,
    )
    process.stdout.readline()
    return process


def take(folder):
    """Seconds until the lock is this process's; it is released again."""
    baton, began = GuardedBaton(str(folder / "lock")), time.monotonic()
    assert baton.try_acquire() is True
    seconds = time.monotonic() - began
    baton.release()
    assert not (folder / "lock").exists()
    return seconds


def is_stale(folder):
    return stale_locks(folder.parent) == [str(folder / "lock")]


def test_every_build_of_this_process_is_guarded():
    assert cpp_extension.FileBaton is GuardedBaton


def test_the_lock_of_a_killed_writer_is_removed_and_named(capfd, folder, holding):
    process = holding()
    assert not is_stale(folder)
    process.kill()
    process.join()
    assert is_stale(folder)
    assert take(folder) < 5
    said = capfd.readouterr().err
    assert re.search(rf"rank 0 \(.*removed {folder}/lock, made at .* by process {process.pid} of host .*, which is gone", said)


def test_a_writer_that_lives_is_waited_for_and_named_once_within_seconds(capfd, folder, holding, monkeypatch):
    assert build_locks.FIRST_WORD_SECONDS <= 8
    monkeypatch.setattr(build_locks, "FIRST_WORD_SECONDS", 0.3)
    monkeypatch.setattr(build_locks, "_LOOK", 0.1)
    monkeypatch.setenv("RANK", "3")
    process = holding(seconds=2.0)
    assert take(folder) > 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(
        rf"rank 3 \(.*waiting since [\d: -]+ \(\d s\) for {folder}/lock, made at .* by process {process.pid} of", line
    )


@pytest.mark.skipif(sys.platform != "linux", reason="who has a file open is seen in /proc")
def test_a_lock_without_a_note_counts_for_as_long_as_it_is_open(capfd, folder, sees_everybody):
    process = plain("import os; os.open('lock', os.O_CREAT | os.O_EXCL)", cwd=folder.parent)
    shutil.move(folder.parent / "lock", folder / "lock")
    try:
        assert not is_stale(folder)
    finally:
        process.kill()
        process.wait()
    assert take(folder) < 5
    assert "no process of this machine has it open: left by a start that was killed" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="who works in a folder is seen in /proc")
def test_compilers_that_were_left_behind_are_waited_for(folder, holding):
    process, compiler = holding(), plain("pass", cwd=folder)
    process.kill()
    process.join()
    try:
        assert not is_stale(folder)
        age(folder, 31)  # longer than anything compiles
        assert is_stale(folder)
        age(folder, 0)
    finally:
        compiler.kill()
        compiler.wait()
    assert is_stale(folder)


def age(folder, minutes):
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60 * minutes,) * 2)


@pytest.mark.parametrize("has_note", [True, False])
def test_a_lock_of_another_host_goes_when_nothing_has_changed_for_long(capfd, folder, monkeypatch, has_note):
    monkeypatch.setattr(build_locks, "_sees_everybody", lambda lock: False)
    (folder / "lock").write_text(json.dumps({"process": 1, "host": "elsewhere", "since": 0.0}) if has_note else "")
    (folder / "one.o").touch()
    is_stale_now, text = build_locks.judge(folder / "lock")
    assert not is_stale_now and f"rm {folder}/lock" in text
    age(folder, 29)
    assert not is_stale(folder)
    age(folder, 31)
    assert is_stale(folder)
    (folder / "one.o").touch()  # somebody compiles
    assert not is_stale(folder)
    age(folder, 31)
    assert take(folder) < 5
    assert "nothing has changed there for 31 minutes: left by a start that was killed" in capfd.readouterr().err


def test_a_container_that_cannot_see_its_neighbours_leaves_their_locks(folder, monkeypatch):
    (folder / "lock").touch()
    monkeypatch.setattr(build_locks, "_FIRST_PID_NAMESPACE", "pid:[0]")
    assert not is_stale(folder)


def take_turns(folder, ready, record):
    ready.wait(30)
    baton = GuardedBaton(str(folder / "lock"))
    for _ in range(3):
        baton.try_acquire()
        with record.open("a") as file:
            print("in", file=file, flush=True)
            time.sleep(0.02)
            print("out", file=file, flush=True)
        baton.release()


def test_of_several_that_find_a_stale_lock_one_builds_at_a_time(folder, sees_everybody):
    (folder / "lock").touch()
    record, ready = folder.parent / "record", here.Event()
    processes = [here.Process(target=take_turns, args=(folder, ready, record)) for _ in range(4)]
    for process in processes:
        process.start()
    ready.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert record.read_text().split() == ["in", "out"] * 12


def wait_behind_a_lock(folder, mark):
    mark.write_text(str(os.getpid()))
    time.sleep(600)


KILLED_RUN = """
import os, pathlib, sys
from tests.support.pool import Ranks
from tests.unit.test_build_locks import wait_behind_a_lock
if __name__ == "__main__":
    Ranks()(1, wait_behind_a_lock, None, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_ranks_of_a_test_run_that_is_killed_do_not_outlive_it(tmp_path):
    (tmp_path / "run.py").write_text(KILLED_RUN)
    mark = tmp_path / "mark"
    run = subprocess.Popen([sys.executable, tmp_path / "run.py", mark], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 120
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    rank = int(mark.read_text())
    run.send_signal(signal.SIGKILL)
    run.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(rank, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(rank, signal.SIGKILL)
    raise AssertionError(f"process {rank} lives on")
