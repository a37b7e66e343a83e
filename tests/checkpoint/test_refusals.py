"""What cannot be loaded or saved: one clear error on every rank, and nothing has changed."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from losia_dist import load_checkpoint, save_checkpoint
from losia_dist.checkpoint import atomic_files, layout
from losia_dist.errors import LoSiAError
from tests.support import resume as runs

RUN = replace(runs.RUN, steps=6, config={**runs.RUN.config, "period": 2})
STEP, SAVES = 5, (3, 5)  # subnets move after steps 2 and 4: the second save has a journal


def barrier():
    if dist.is_initialized():
        dist.barrier()


def first_rank():
    return not dist.is_initialized() or dist.get_rank() == 0


def try_to(action):
    """The error's type and text, or None."""
    try:
        action()
    except LoSiAError as error:
        return type(error).__name__, str(error)
    return None


def edit_manifest(path: Path, change) -> None:
    """Change a manifest and make its checksum right again: what is left is what the manifest says."""
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    record = atomic_files.write_text(path / "manifest.json", json.dumps(content))
    marker = json.loads((path / "COMPLETE").read_text())
    atomic_files.write_text(path / "COMPLETE", json.dumps({**marker, "manifest_crc32": record.crc32}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))


def some(directory: Path, pattern: str) -> Path:
    return sorted(directory.glob(pattern))[-1]


DAMAGES = {
    "state corrupted": (lambda d: flip(some(d, "step-*/state-*1.*")), r"state-00001\.safetensors is damaged"),
    "base corrupted": (lambda d: flip(some(d, "base/weights-*0.*")), r"weights-00000\.safetensors is damaged"),
    "journal corrupted": (lambda d: flip(some(d, "journal/*")), "is damaged"),
    "state truncated": (lambda d: os.truncate(some(d, "step-*/state-*"), 100), "has 100 bytes instead of"),
    "base missing": (lambda d: some(d, "base/weights-*").unlink(), r"weights-00001\.safetensors is missing"),
    "journal missing": (lambda d: some(d, "journal/*").unlink(), "is missing"),
    "state missing": (lambda d: some(d, "step-*/state-*").unlink(), r"state-00001\.safetensors is missing"),
    "manifest missing": (lambda d: some(d, "step-*/manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest corrupted": (lambda d: flip(some(d, "step-*/manifest.json")), r"manifest\.json is damaged"),
    "manifest foreign": (lambda d: edit_manifest(some(d, "step-*"), lambda m: m.pop("kind")), "is not a manifest of this"),
    "base of another run": (lambda d: atomic_files.write_text(d / "base/manifest.json", "{}"), "is damaged"),
    "newer format": (lambda d: edit_manifest(some(d, "step-*"), lambda m: m.update(format=99)), "format 99; this version"),
    "a removed selection": (
        lambda d: edit_manifest(some(d, "step-*"), lambda m: m["losia_config"].update(selection="alternating")),
        r"saved with a setting that is gone: selection='alternating' was removed: .*0\.8027.* start a new run",
    ),
    "a removed accumulation": (
        lambda d: edit_manifest(some(d, "step-*"), lambda m: m["losia_config"].update(importance_accumulation="micro_batch")),
        r"saved with a setting that is gone: importance_accumulation='micro_batch' was removed",
    ),
    "removed moments": (
        lambda d: edit_manifest(some(d, "step-*"), lambda m: m["losia_config"].update(moments="kept")),
        r"saved with a setting that is gone: moments='kept' was removed",
    ),
    "never complete": (lambda d: [p.unlink() for p in d.glob("*/COMPLETE")], "no complete checkpoint in"),
    "empty": (lambda d: [atomic_files.remove(p) for p in d.iterdir()], "no complete checkpoint in"),
    "not there": (lambda d: atomic_files.remove(d), "the directory does not exist"),
}


def load_damaged(directory: Path) -> dict[str, tuple]:
    """Each damage's error on this rank, and whether the run was left as it was."""
    losia, stepper, close = runs.start("ddp", RUN)
    runs.train_on(losia, stepper, RUN, STEP, lambda done: done in SAVES and save_checkpoint(directory, **runs.parts(losia)))
    before, results = runs.everything(losia), {}
    for case, (damage, _) in DAMAGES.items():
        copy = directory.with_name(f"copy of {case}")
        if first_rank():
            shutil.copytree(directory, copy)
            damage(copy)
        barrier()
        error = try_to(lambda copy=copy: load_checkpoint(copy, **runs.parts(losia)))
        after = runs.everything(losia)
        same = losia.steps == STEP and all(torch.equal(after[name], tensor) for name, tensor in before.items())
        results[case] = (error, same and after.keys() == before.keys())
    close()
    return results


def test_damaged_checkpoints_are_refused_on_every_rank_and_change_nothing(ranks, tmp_path):
    directory = tmp_path / "run"
    results = ranks(2, load_damaged, directory)
    for case, (_, text) in DAMAGES.items():
        errors = [result[case][0] for result in results]
        assert errors[0] is not None and errors[0] == errors[1], case
        assert errors[0][0] == "CheckpointError", case
        assert re.search(text, errors[0][1]), errors[0][1]
        assert all(result[case][1] for result in results), f"{case} changed the run"


def test_a_checkpoint_that_names_removed_settings_with_the_values_that_were_kept_loads(tmp_path):
    losia, stepper, close = runs.start("one", RUN)
    runs.train_on(losia, stepper, RUN, STEP)
    save_checkpoint(tmp_path, **runs.parts(losia))
    kept = {"moments": "cleared", "importance_accumulation": "step", "selection": "greedy"}
    edit_manifest(some(tmp_path, "step-*"), lambda m: m["losia_config"].update(kept))
    before = runs.everything(losia)
    close()
    other, _, close = runs.start("one", RUN)
    load_checkpoint(tmp_path, **runs.parts(other))
    after = runs.everything(other)
    close()
    assert other.steps == STEP and all(torch.equal(after[name], tensor) for name, tensor in before.items())


OTHERS = {
    "another model": (replace(RUN, model={"intermediate_size": 61}), "weight 'model.layers.0.mlp.gate_proj.weight'"),
    "deeper model": (replace(RUN, model={"num_hidden_layers": 4}), "the checkpoint has none of that name"),
    "another rank factor": (replace(RUN, config={**RUN.config, "rank_factor": 0.5}), r"rank_factor=0\.25, and this run has"),
    "another period": (replace(RUN, config={**RUN.config, "period": 3}), "period=2, and this run has period=3"),
    "another precision": (replace(RUN, dtype="bf16"), "'dtype': 'float32'.*'dtype': 'bfloat16'"),
    "norms frozen": (replace(RUN, config={**RUN.config, "train_norms": False}), "train_norms=True"),
}


def load_into_others(directory: Path) -> dict[str, tuple]:
    losia, stepper, _ = runs.start("one", RUN)
    runs.train_on(losia, stepper, RUN, STEP)
    save_checkpoint(directory, **runs.parts(losia))
    results = {}
    for case, (run, _) in OTHERS.items():
        other = runs.start("one", run)[0]
        before = runs.everything(other)
        error = try_to(lambda other=other: load_checkpoint(directory, **runs.parts(other)))
        after = runs.everything(other)
        results[case] = (error, other.steps == 0 and all(torch.equal(after[name], t) for name, t in before.items()))
    scheduler = torch.optim.lr_scheduler.ConstantLR(losia.state.optimizer)
    results["scheduler"] = try_to(lambda: load_checkpoint(directory, **runs.parts(losia), scheduler=scheduler))
    results["step"] = try_to(lambda: load_checkpoint(directory, **runs.parts(losia), step=77))
    optimizer = torch.optim.AdamW(losia.state.optimizer.param_groups)
    results["optimizer"] = try_to(lambda: load_checkpoint(directory, **{**runs.parts(losia), "optimizer": optimizer}))
    return results


def test_a_checkpoint_of_another_run_is_refused_with_the_first_difference(tmp_path):
    results = load_into_others(tmp_path)
    for case, (_, text) in OTHERS.items():
        (kind, message), unchanged = results[case]
        assert kind == "CheckpointError" and unchanged, case
        assert re.search(text, message), message
    assert "holds no scheduler, and ConstantLR was passed" in results["scheduler"][1]
    assert "no complete checkpoint step-00000077" in results["step"][1] and "step-00000005" in results["step"][1]
    assert "optimizer is not the one that this conductor drives" in results["optimizer"][1]


def save_where_it_cannot(directory: Path) -> dict[str, tuple]:
    losia, stepper, close = runs.start("ddp", RUN)
    runs.train_on(losia, stepper, RUN, 3)
    taken = directory / "taken"
    save_checkpoint(taken, **runs.parts(losia))
    other, _, other_close = runs.start("ddp", RUN)
    results = {"taken": try_to(lambda: save_checkpoint(taken, **runs.parts(other)))}
    results["a file"] = try_to(lambda: save_checkpoint(taken / "latest", **runs.parts(other)))
    if dist.get_rank() == 1:  # one rank's disk is full
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
    results["full"] = try_to(lambda: save_checkpoint(directory / "full", **runs.parts(other)))
    if dist.get_rank() == 1:
        shutil.disk_usage = usage
    extra = {"loader": object()} if dist.get_rank() == 0 else None
    results["extra"] = try_to(lambda: save_checkpoint(directory / "full", **runs.parts(other), extra=extra))
    results["differ"] = try_to(lambda: save_checkpoint(directory / f"of {dist.get_rank()}", **runs.parts(other)))
    batch = {name: t.chunk(2)[dist.get_rank()] for name, t in runs.global_batches(RUN)[0][0].items()}
    other.model(**batch).loss.backward()
    results["mid accumulation"] = try_to(lambda: save_checkpoint(directory / "full", **runs.parts(other)))
    other.state.optimizer.step()
    results["before losia.step"] = try_to(lambda: save_checkpoint(directory / "full", **runs.parts(other)))
    other.step()
    results["after"] = try_to(lambda: save_checkpoint(directory / "full", **runs.parts(other)))
    close()
    other_close()
    return results


def test_saving_where_it_cannot_work_is_refused_on_every_rank(ranks, tmp_path):
    results = ranks(2, save_where_it_cannot, tmp_path)
    assert results[0] == results[1]
    (result, _) = results
    assert "holds checkpoints of another run (step-00000003 ...)" in result["taken"][1]
    assert "FileExistsError" in result["a file"][1] or "NotADirectoryError" in result["a file"][1]
    assert "not enough disk space" in result["full"][1] and "rank 1 of 2" in result["full"][1]
    assert "extra['loader'] is a builtins.object" in result["extra"][1]
    assert "ranks differ in what save_checkpoint was asked for" in result["differ"][1]
    for case in ("mid accumulation", "before losia.step"):
        assert "in the middle of an optimizer step" in result[case][1]
    assert result["after"] is None
    assert [c.path.name for c in layout.complete_checkpoints(tmp_path / "full")] == ["step-00000001"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_read_only_directory_is_refused():
    losia, _, close = runs.start("one", RUN)
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        if root:
            os.seteuid(65534)  # root may write anywhere
        try:
            kind, message = try_to(lambda: save_checkpoint(Path(directory) / "run", **runs.parts(losia)))
        finally:
            if root:
                os.seteuid(0)
            os.chmod(directory, 0o755)
    assert kind == "CheckpointError" and "Permission denied" in message
    close()
