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
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from losia_dist.ranks import build_locks
from losia_dist.ranks.build_locks import GuardedBaton, Judgement, stale_locks

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
def test_a_lock_without_a_note_counts_for_as_long_as_it_is_open(capfd, folder):
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


@pytest.mark.parametrize("note, limit", [(True, 3), (False, 30)])
def test_a_lock_of_another_host_goes_when_nothing_has_changed_for_long(folder, monkeypatch, note, limit):
    monkeypatch.setattr(build_locks, "_file_system", lambda folder: "nfs4")
    text = json.dumps({"process": 1, "host": "elsewhere", "boot": "other", "since": 0.0, "held": True})
    (folder / "lock").write_text(text if note else "")
    (folder / "one.o").touch()
    with (folder / "lock").open("r+") as file:
        judgement = build_locks.judge(folder / "lock", file.fileno())
    assert not judgement.is_stale and f"rm {folder}/lock" in judgement.text
    age(folder, limit - 1)
    assert not is_stale(folder)
    age(folder, limit + 1)
    assert is_stale(folder)
    (folder / "one.o").touch()  # somebody compiles
    assert not is_stale(folder)


def test_what_only_this_machine_can_have_written_goes_after_its_restart(folder, monkeypatch):
    monkeypatch.setattr(build_locks, "_file_system", lambda folder: "ext4")
    note = {"process": os.getppid(), "host": "here", "boot": "before", "since": 0.0, "held": True}
    (folder / "lock").write_text(json.dumps(note))
    assert is_stale(folder)


def test_a_container_that_cannot_see_its_neighbours_leaves_their_locks(folder, monkeypatch):
    monkeypatch.setattr(build_locks, "_FIRST_PID_NAMESPACE", "pid:[0]")
    monkeypatch.setattr(build_locks, "_file_system", lambda folder: "ext4")
    (folder / "lock").touch()
    assert not is_stale(folder)
    monkeypatch.setattr(build_locks, "_file_system", lambda folder: "overlay")  # nobody else's
    assert is_stale(folder)


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


def test_of_several_that_find_a_stale_lock_one_builds_at_a_time(folder):
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


def test_a_lock_that_was_made_while_a_stale_one_was_judged_stays(folder, monkeypatch):
    def judge(lock, descriptor):
        lock.unlink()
        lock.write_text("other")
        return Judgement(True, "")

    monkeypatch.setattr(build_locks, "judge", judge)
    (folder / "lock").touch()
    build_locks._Waiting(folder / "lock").look()
    assert (folder / "lock").read_text() == "other"


def test_a_lock_that_somebody_else_has_made_since_is_not_released(folder):
    baton = GuardedBaton(str(folder / "lock"))
    baton.try_acquire()
    (folder / "lock").unlink()
    (folder / "lock").write_text("other")
    baton.release()
    assert (folder / "lock").read_text() == "other"


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files there")
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.9])
def test_a_library_that_was_cut_short_is_built_again(capfd, folder, kept):
    whole = Path(torch._C.__file__).read_bytes()
    (folder / "whole.so").write_bytes(whole)
    (folder / "cut.so").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    (folder / "notes.txt").write_text("")
    take(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "whole.so"]
    assert f"removed {folder}/cut.so, which was cut short" in capfd.readouterr().err


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
