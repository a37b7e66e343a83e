"""A save completes or leaves everything as it was, wherever it fails; old ones go only after a new one is complete."""

import builtins
import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from losia_dist import load_checkpoint, save_checkpoint
from losia_dist.checkpoint import atomic_files, layout
from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.session import wait_for_saving
from losia_dist.errors import CheckpointError, ConfigError
from tests.support import resume as runs

RUN = replace(runs.RUN, steps=12, config={**runs.RUN.config, "period": 2})


class FullDisk:
    """While entered, the n-th operation that changes the disk (open, write, sync, rename, mkdir) fails; n = 0: none."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.done = fails_at, 0

    def count(self) -> None:
        self.done += 1
        if self.done == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self):
        self.kept = (os.fsync, os.replace, Path.mkdir, builtins.open)

        def counted(function):
            def call(*args, **kwargs):
                self.count()
                return function(*args, **kwargs)

            return call

        def counted_open(path, mode="r", *args, **kwargs):
            if not set(mode) & set("wxa"):
                return self.kept[3](path, mode, *args, **kwargs)
            self.count()
            file = self.kept[3](path, mode, *args, **kwargs)
            return CountedFile(file, self)

        os.fsync, os.replace, Path.mkdir = (counted(function) for function in self.kept[:3])
        atomic_files.open = counted_open
        return self

    def __exit__(self, *_) -> None:
        os.fsync, os.replace, Path.mkdir = self.kept[:3]
        del atomic_files.open


class CountedFile:
    """Fails at its third write at most: behind the header, in the middle of the data."""

    def __init__(self, file, disk) -> None:
        self.file, self.disk, self.writes = file, disk, 0

    def write(self, data):
        self.writes += 1
        if self.writes <= 3:
            self.disk.count()
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def names(directory: Path) -> list[str]:
    return [complete.path.name for complete in layout.complete_checkpoints(directory)]


def assert_whole(directory: Path) -> None:
    for complete in layout.complete_checkpoints(directory):
        Reader(complete).check_files(0, 1)


def fail_everywhere(directory: Path, failing_rank: int) -> dict:
    """Save at step 3; then, at step 5, with a failure at the first operation, the second, ... until none is left to fail."""
    rank = dist.get_rank()
    losia, stepper, close = runs.start("ddp", RUN)
    runs.train_on(losia, stepper, RUN, 3)
    if failing_rank == 0:  # the first save writes the base too
        attempts = count_attempts(losia, directory, rank == failing_rank, [])
    save_checkpoint(directory, **runs.parts(losia))
    runs.train_on(losia, stepper, RUN, 5)
    attempts = count_attempts(losia, directory, rank == failing_rank, ["step-00000003"])
    runs.train_on(losia, stepper, RUN, 6)
    # The same step again: the one before it is whole until the new one is.
    again = count_attempts(losia, directory, rank == failing_rank, ["step-00000003", "step-00000005"])
    before = runs.everything(losia)
    other = runs.start("ddp", RUN, other_weights=True)[0]
    load_checkpoint(directory, **runs.parts(other))
    after = runs.everything(other)
    different = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    close()
    return {"attempts": (attempts, again), "different": different, "left": [p.name for p in directory.iterdir()]}


def count_attempts(losia, directory: Path, failing: bool, complete: list[str]) -> int:
    for attempt in range(1, 200):
        dist.barrier()
        fired = torch.zeros(1)
        failed = False
        with FullDisk(attempt if failing else 0) as disk:
            try:
                save_checkpoint(directory, **runs.parts(losia))
            except CheckpointError as error:
                failed = "No space left on device" in str(error)
                if not failed:
                    raise
        fired += disk.done >= disk.fails_at > 0
        dist.all_reduce(fired)
        dist.barrier()
        if failed:
            assert fired
            assert names(directory) == complete
            assert_whole(directory)
            assert not [p for p in directory.glob("*") if layout.is_leftover(p.name) and "replaced" not in p.name]
        else:
            assert names(directory) == [*complete, layout.step_name(losia.steps)]
            assert_whole(directory)
            return attempt
    raise AssertionError("every attempt failed")


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failure_at_any_write_leaves_the_checkpoints_before_it_whole(ranks, tmp_path, failing_rank):
    for result in ranks(2, fail_everywhere, tmp_path / "run", failing_rank):
        assert result["different"] == []  # what failed saves did not write went into the one that worked
        assert min(result["attempts"]) > 4
        assert sorted(result["left"])[:2] == ["base", "journal"] and not [n for n in result["left"] if ".tmp-" in n]


def test_replacing_a_checkpoint_of_the_same_step_keeps_one_whole(tmp_path):
    losia, stepper, close = runs.start("one", RUN)
    runs.train_on(losia, stepper, RUN, 3)
    save_checkpoint(tmp_path, **runs.parts(losia), step=1, extra="old")
    for attempt in range(1, 100):
        with FullDisk(attempt):
            try:
                save_checkpoint(tmp_path, **runs.parts(losia), step=1, extra="new")
            except CheckpointError:
                assert load_checkpoint(tmp_path, **runs.parts(losia)) == "old"
            else:
                break
    assert attempt > 15 and load_checkpoint(tmp_path, **runs.parts(losia)) == "new"
    assert names(tmp_path) == ["step-00000001"]
    close()


def test_a_crash_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    losia, _, close = runs.start("one", RUN)
    save_checkpoint(tmp_path, **runs.parts(losia), extra="old")
    (tmp_path / "step-00000000").rename(tmp_path / "step-00000000.replaced-abc123")
    (tmp_path / "step-00000000.tmp-abc123").mkdir()
    assert load_checkpoint(tmp_path, **runs.parts(losia)) == load_checkpoint(tmp_path, **runs.parts(losia), step=0) == "old"
    save_checkpoint(tmp_path, **runs.parts(losia), extra="new")
    assert load_checkpoint(tmp_path, **runs.parts(losia)) == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "journal", "latest", "step-00000000"]
    close()


def test_keep_last_deletes_older_steps_and_keeps_the_journal_that_is_needed(tmp_path):
    losia, stepper, close = runs.start("one", RUN)
    runs.train_on(
        losia, stepper, RUN, 9, lambda done: save_checkpoint(tmp_path, **runs.parts(losia), keep_last=2) if done > 2 else None
    )
    assert names(tmp_path) == ["step-00000008", "step-00000009"]
    assert (tmp_path / "latest").read_text() == "step-00000009\n"
    moves = [4, 6, 8]  # subnets that moved since the first save, at step 3
    assert len(list((tmp_path / "journal").iterdir())) == len(moves)
    resumed = runs.resume("one", RUN, tmp_path, None)
    runs.assert_equal(resumed, runs.train_and_save("one", RUN, None, ()))
    with pytest.raises(ConfigError, match="keep_last=0"):
        save_checkpoint(tmp_path, **runs.parts(losia), keep_last=0)
    close()


def test_a_run_continues_its_directory_after_loading_and_gets_a_base_of_its_own_elsewhere(tmp_path):
    undisturbed = runs.train_and_save("one", RUN, tmp_path / "a", (5,))
    losia, stepper, _ = runs.start("one", RUN, other_weights=True)
    load_checkpoint(tmp_path / "a", **runs.parts(losia))
    runs.train_on(losia, stepper, RUN, 7)
    save_checkpoint(tmp_path / "a", **runs.parts(losia))
    save_checkpoint(tmp_path / "b", **runs.parts(losia))
    runs.train_on(losia, stepper, RUN, 9)  # both journals go on
    save_checkpoint(tmp_path / "a", **runs.parts(losia))
    save_checkpoint(tmp_path / "b", **runs.parts(losia))
    for directory in ("a", "b"):
        runs.assert_equal(runs.resume("one", RUN, tmp_path / directory, None), undisturbed)
    # Back to the past: what the abandoned future wrote is not mixed in.
    load_checkpoint(tmp_path / "a", **runs.parts(losia), step=5)
    runs.train_on(losia, stepper, RUN, 8)
    save_checkpoint(tmp_path / "a", **runs.parts(losia))
    runs.assert_equal(runs.resume("one", RUN, tmp_path / "a", None), undisturbed)
    assert names(tmp_path / "a") == ["step-00000005", "step-00000007", "step-00000009", "step-00000008"]


def save_asynchronously(directory: Path) -> dict:
    losia, stepper, close = runs.start("ddp", RUN)
    save = {**runs.parts(losia), "asynchronous": True}
    runs.train_on(losia, stepper, RUN, 5, lambda done: save_checkpoint(directory, **save))
    wait_for_saving(losia)
    if dist.get_rank() == 1:  # fails in the thread of one rank
        write, atomic_files.write_tensors = atomic_files.write_tensors, lambda *_: (_ for _ in ()).throw(OSError("cut wire"))
    runs.train_on(losia, stepper, RUN, 7, lambda done: done == 7 and save_checkpoint(directory, **save))
    with pytest.raises(CheckpointError, match=r"rank 1 of 2: .*cut wire"):
        save_checkpoint(directory, **save)
    if dist.get_rank() == 1:
        atomic_files.write_tensors = write
    complete = names(directory)
    runs.train_on(losia, stepper, RUN, 9)
    write, trained = atomic_files.write_tensors, threading.Event()
    atomic_files.write_tensors = lambda *arguments: trained.wait() and write(*arguments)
    save_checkpoint(directory, **save)
    losses = runs.train_on(losia, stepper, RUN, RUN.steps)  # before anything is written
    trained.set()
    wait_for_saving(losia)
    atomic_files.write_tensors = write
    result = {"losses": losses, "everything": runs.everything(losia), "complete": complete}
    close()
    return result


def test_saving_asynchronously_saves_the_moment_of_the_call_and_raises_at_the_next(ranks, tmp_path):
    results = ranks(2, save_asynchronously, tmp_path)
    resumed = ranks(2, runs.resume, "ddp", RUN, tmp_path, None)
    for result, again in zip(results, resumed, strict=True):
        assert result["complete"] == [layout.step_name(step) for step in range(1, 6)]
        runs.assert_equal({**again, "first": 0}, result)
        assert again["first"] == 9


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_a_save_that_goes_on_beside_the_run_copies_what_is_in_host_memory(tmp_path, monkeypatch, asynchronous):
    losia, stepper, close = runs.start("one", RUN)
    runs.train_on(losia, stepper, RUN, 4)
    held = {tensor.data_ptr() for tensor in losia.state.state_tensors()}
    held |= {average.data_ptr() for one in losia.accumulators.values() for average in (one.mean, one.deviation)}
    write, written = atomic_files.write_tensors, []

    def spy(path, tensors, *rest):
        written.extend(tensor.data_ptr() for name, tensor in tensors.items() if name.startswith(("state/", "importance/")))
        return write(path, tensors, *rest)

    monkeypatch.setattr(atomic_files, "write_tensors", spy)
    save_checkpoint(tmp_path, **runs.parts(losia), asynchronous=asynchronous)
    wait_for_saving(losia)
    close()
    assert len(held) > 2 and (held.isdisjoint(written) if asynchronous else held <= set(written))
