"""`losia-dist doctor`: what it finds on a machine and on a cluster, in words that name the fix, and how it ends."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from losia_dist.cli import main as cli
from losia_dist.tools.doctor import across_ranks as over_ranks
from losia_dist.tools.doctor import links, machine, storage
from losia_dist.tools.doctor.findings import ERROR, WARNING, error, merge, ok, render, spans, to_json
from losia_dist.tools.doctor.machine_facts import Gpu, code_hash, collect
from losia_dist.tools.doctor.rendezvous import RendezvousFailed, launched_process, until
from tests.support.launching import BIN, ROOT, torchrun

FULL = Gpu("H100", "GPU-0", 79 * 10**9, 80 * 10**9, has_bf16=True)


@pytest.fixture(scope="module")
def here():
    """This machine, with an empty environment and nothing to complain of."""
    facts = collect({})
    return replace(facts, programs=["c++", "ninja", "nvcc"], shared_memory=1 << 34, has_infiniband=False, stale_locks=[])


def of(level, findings):
    return [f"{finding.text} {finding.fix}" for finding in findings if finding.level == level]


def without(versions, name):
    return {other: version for other, version in versions.items() if other != name}


def examined(facts, *, local_rank=0, local_world_size=1, needs_deepspeed=False):
    return machine.examine(facts, local_rank, local_world_size, needs_deepspeed)


def test_a_machine_that_trains_here_has_no_errors(here):
    assert not of(ERROR, examined(here)) and not of(WARNING, examined(here))


@pytest.mark.parametrize(
    "change, level, words",
    [
        (
            lambda f: {"versions": {**f.versions, "torch": "2.6.0"}},
            ERROR,
            r"torch 2.6.0 is outside (>=[\d.]+). pip install 'torch\1'",
        ),
        (lambda f: {"versions": {**f.versions, "transformers": "6.1.0"}}, ERROR, "transformers 6.1.0 is outside"),
        (
            lambda f: {"versions": {**f.versions, "deepspeed": "0.18.0"}},
            WARNING,
            "deepspeed 0.18.0 is outside .*extra deepspeed",
        ),
        (lambda f: {"versions": without(f.versions, "safetensors")}, ERROR, "safetensors is not installed"),
        (lambda f: {"has_distributed": False, "backends": []}, ERROR, "without torch.distributed: one process only"),
        (lambda f: {"backends": ["gloo"], "cuda_build": "12.8", "gpus": [FULL]}, ERROR, "without NCCL"),
        (lambda f: {"has_gpu_device_file": True, "cuda_build": ""}, ERROR, "has GPUs, and torch is a build for CPUs"),
        (lambda f: {"cuda_build": "12.8", "backends": ["gloo", "nccl"]}, WARNING, "sees no GPU: .*CUDA_VISIBLE_DEVICES"),
        (lambda f: {"environment": {"ACCELERATE_USE_FSDP": "true"}}, WARNING, "on a CPU Accelerate drops FSDP"),
        (
            lambda f: {"environment": {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}},
            WARNING,
            "135712",
        ),
        (lambda f: {"stale_locks": ["/c/op/lock"]}, WARNING, "/c/op/lock was left by .*killed: .* rm /c/op/lock"),
        (lambda f: {"programs": ["c++"]}, WARNING, "ninja not found: DeepSpeed cannot compile"),
        (
            lambda f: {"gpus": [replace(FULL, free=9 * 10**9)]},
            WARNING,
            r"9.0 of 80.0 GB free; something else uses it. nvidia-smi",
        ),
        (lambda f: {"gpus": [replace(FULL, has_bf16=False)]}, WARNING, "no bf16, .*--precision fp32"),
        (lambda f: {"gpus": [FULL, FULL], "shared_memory": 1 << 26}, WARNING, "/dev/shm of .* has 67 MB.*--shm-size"),
        (lambda f: {"has_infiniband": True, "locked_memory": 1 << 16}, WARNING, "limited to 0 MB .*ulimit -l unlimited"),
        (lambda f: {"environment": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}}, WARNING, "hangs for ever. unset it"),
        (lambda f: {"environment": {"NCCL_BLOCKING_WAIT": "1"}}, WARNING, "is an old name. TORCH_NCCL_BLOCKING_WAIT"),
        (
            lambda f: {"environment": {"GLOO_SOCKET_IFNAME": "eth9"}},
            ERROR,
            "GLOO_SOCKET_IFNAME=eth9 names no interface of .*lo",
        ),
        (lambda f: {"environment": {"NCCL_SOCKET_IFNAME": "=eth9"}}, ERROR, "NCCL_SOCKET_IFNAME==eth9 names no interface"),
        (lambda f: {"environment": {"LOSIA_LIVENESS": "0"}}, WARNING, "LOSIA_LIVENESS=0: a rank that is lost"),
        (lambda f: {"environment": {"LOSIA_LIVENESS_PATIENCE": "soon"}}, ERROR, "LOSIA_LIVENESS_PATIENCE='soon' must be"),
    ],
)
def test_what_is_wrong_with_a_machine_is_one_finding_with_its_fix(here, change, level, words):
    findings = examined(replace(here, **change(here)))
    (found,) = [text for kind in (ERROR, WARNING) for text in of(kind, findings)]
    assert of(level, findings) == [found]
    assert re.search(words, found), found


def test_deepspeed_that_a_run_names_must_be_there_and_able_to_compile(here):
    lacking = without(here.versions, "deepspeed")
    assert "deepspeed is not installed" in of(ERROR, examined(replace(here, versions=lacking), needs_deepspeed=True))[0]
    assert not of(ERROR, examined(replace(here, versions=lacking)))
    assert "c++ not found" in of(ERROR, examined(replace(here, programs=["ninja"]), needs_deepspeed=True))[0]


def test_interfaces_are_named_as_nccl_and_gloo_read_them(here):
    facts = replace(here, interfaces=["lo", "eth0"])
    for name, value, fine in [
        ("NCCL", "eth", True), ("NCCL", "=eth0", True), ("NCCL", "^docker", True), ("NCCL", "ib0,eth", True),
        ("NCCL", "=eth", False), ("GLOO", "eth0", True), ("GLOO", "eth", False),
    ]:  # fmt: skip
        findings = list(machine.check_settings(replace(facts, environment={f"{name}_SOCKET_IFNAME": value})))
        assert (findings == []) == fine, (name, value)


def test_more_ranks_than_gpus_on_a_host_are_an_error(here):
    facts = replace(here, gpus=[FULL], cuda_build="12.8", backends=["gloo", "nccl"])
    assert "2 ranks on" in of(ERROR, examined(facts, local_rank=1, local_world_size=2))[0]


def test_differences_between_ranks_name_the_values_the_ranks_and_the_hosts(here):
    first = replace(here, host="a", environment={"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "eth0"})
    other = replace(
        first,
        host="b",
        code="0" * 16,
        versions={**here.versions, "torch": "2.9.0"},
        environment={"NCCL_SOCKET_IFNAME": "ens5"},
        gpus=[FULL],
    )
    answers = [(first, {"--losia_config": "aa"}), (first, {"--losia_config": "aa"}), (other, {"--losia_config": "bb"})]
    texts = of(ERROR, over_ranks.compare(answers, [0, 1, 0]))
    assert len(texts) == 5
    assert f"losia_dist's source differs: {here.code} on ranks 0-1 (a); {'0' * 16} on rank 2 (b)." in texts[0]
    assert f"the version of torch differs: {here.versions['torch']} on ranks 0-1 (a); 2.9.0 on rank 2 (b)." in texts[1]
    assert "the file of --losia_config differs: aa on ranks 0-1 (a); bb on rank 2 (b)." in texts[2]
    assert "the environment's NCCL_IB_DISABLE differs: 1 on ranks 0-1 (a); nothing on rank 2 (b)." in texts[3]
    assert "no GPU: ranks 0-1; H100: rank 2" in texts[4]


def test_two_ranks_on_one_gpu_are_an_error(here):
    facts = replace(here, gpus=[FULL])
    (text,) = of(ERROR, over_ranks.compare([(facts, {})] * 2, [0, 0]))
    assert "ranks 0-1 use one GPU" in text


def test_locks_behind_which_nobody_builds_are_stale(tmp_path, monkeypatch):
    monkeypatch.setattr("losia_dist.ranks.build_locks._sees_everybody", lambda lock: True)  # the tests may run in a container
    for name in ("left", "py311_cpu/left", "held"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    with (tmp_path / "held" / "lock").open() as file:
        keeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=file)
    try:
        found = collect({"TORCH_EXTENSIONS_DIR": str(tmp_path)}).stale_locks
    finally:
        keeper.kill()
        keeper.wait()
    assert found == [str(tmp_path / "left" / "lock"), str(tmp_path / "py311_cpu" / "left" / "lock")]


def test_the_hash_of_the_code_sees_one_changed_byte(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = code_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert code_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_hash(tmp_path) != before


def test_storage_is_compared_with_what_a_run_writes(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 1000)
    target = str(tmp_path / "runs" / "first")
    usage = shutil.disk_usage(tmp_path)
    for free, level in [(2599, ERROR), (2601, "ok")]:
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        (finding,) = storage.check_storage(target, str(tmp_path / "model"))
        assert finding.level == level
    assert [finding.level for finding in storage.check_storage(target, "some/hub-name")] == ["ok", WARNING]
    (tmp_path / "file").write_text("")
    (finding,) = storage.check_storage(str(tmp_path / "file" / "run"), None)
    assert finding.level == ERROR and "is a file" in finding.text
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob(".losia-*"))


def test_a_directory_without_write_access_is_an_error(monkeypatch, tmp_path):
    def refuse(**where):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage.tempfile, "NamedTemporaryFile", refuse)
    (finding,) = storage.check_storage(str(tmp_path), None)
    assert finding.level == ERROR and "cannot be written: [Errno 13]" in finding.text


def test_a_directory_that_is_not_shared_names_the_ranks_that_do_not_see_it(tmp_path):
    mark = storage.leave_mark(str(tmp_path / "not" / "yet"), "token")
    assert storage.sees_mark(mark) and not storage.sees_mark(tmp_path / "else" / mark.name)
    (finding,) = storage.check_shared("/shared", [True, False, False])
    assert finding.level == ERROR and "ranks 1-2 do not see what rank 0 writes there" in finding.text


def test_findings_of_ranks_are_merged_and_errors_come_last():
    placed = merge([[ok("a", "fine"), error("b", "broken.", "mend it")], [ok("a", "fine")], [ok("a", "fine")]])
    assert render(placed, 3) == [
        "ok       a  fine",
        "error    b  broken. [rank 0] Fix: mend it",
        "3 ranks: errors 1, warnings 0, ok 1",
    ]
    assert to_json(placed, 3, {})["findings"][1]["ranks"] == [0]
    assert spans([4, 0, 1, 2, 7]) == "0-2, 4, 7"


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "x"}, "must be numbers"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16"}, "srun started 16 tasks that know no RANK"),
    ],
)
def test_a_launch_that_does_not_say_who_is_who_is_an_error(environment, words):
    with pytest.raises(RendezvousFailed, match=words):
        launched_process(environment)


def test_a_process_alone_needs_no_launcher():
    assert launched_process({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}).world_size == 1  # in a batch script, without srun


def run(words, environment=None, seconds=120):
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(words, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


def test_alone_it_examines_this_machine_and_prints_json(capsys, tmp_path):
    (tmp_path / "losia.yaml").write_text("rank_factor: 0.25\n")
    words = ["doctor", "--json", "--output_dir", str(tmp_path), "--losia_config", str(tmp_path / "losia.yaml")]
    assert cli.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["errors"], said["ranks"], said["links"]) == (0, 1, {})
    assert {"python", "versions", "gpus", "output_dir", "files"} <= {finding["subject"] for finding in said["findings"]}


def test_a_broken_configuration_is_a_finding_and_exit_code_1(capsys, tmp_path):
    (tmp_path / "losia.yaml").write_text("periods: 3\n")
    assert cli.main(["doctor", "--losia_config", str(tmp_path / "losia.yaml"), "--deepspeed", "absent.json"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    assert len(lines) == 2 and "unknown option 'periods'" in lines[0] and "absent.json" in lines[1]


@pytest.mark.parametrize("words", [["--seconds", "0"], ["--seconds", "soon"], ["--whatever"]])
def test_bad_usage_is_exit_code_2(capsys, words):
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor", *words])
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_under_torchrun_the_ranks_meet_compare_themselves_and_measure(tmp_path):
    """One rank with an environment of its own."""
    program = (
        f'[ "$RANK" = 0 ] || export NCCL_IB_DISABLE=1; exec {BIN / "losia-dist"} doctor --json --output_dir {tmp_path / "run"}'
    )
    done = run([*torchrun(2), "--no_python", "bash", "-c", program])
    said = json.loads(done.stdout)
    assert done.returncode != 0 and (said["ranks"], said["errors"]) == (2, 1), done.stderr
    texts = [finding["text"] for finding in said["findings"]]
    assert any("NCCL_IB_DISABLE differs: nothing on rank 0" in text for text in texts)
    assert any("all-reduce over one host" in text for text in texts)
    link = said["links"]["gloo"]
    assert link["correct"] == 1.0 and 0 < link["latency_us"] < 1e6 and link["bandwidth_gb_s"] > 0.01
    assert not (tmp_path / "run").exists() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_within_the_limit():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATH": os.environ["PATH"]}
    variables = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
    words = [str(BIN / "losia-dist"), "doctor", "--seconds", "15"]
    began = time.monotonic()
    pair = [
        subprocess.Popen(words, env={**variables, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 2)
    ]
    said = [process.communicate(timeout=90) for process in pair]
    assert time.monotonic() - began < 80
    assert [process.returncode for process in pair] == [1, 1]
    host = socket.gethostname()
    assert f"rank 1 of 3 did not come within 15 s; ranks 0, 2 did (hosts {host})" in said[0][0]
    assert said[1][1].startswith("error    meeting  rank 1 of 3 did not come") and not said[1][0]


def test_a_call_without_a_limit_of_its_own_ends_with_a_line():
    call = "with until(1, 'rank 3 (host h): waiting did not end'): time.sleep(60)"
    code = f"import time; from losia_dist.tools.doctor.rendezvous import until\n{call}"
    done = run([str(BIN / "python"), "-c", code])
    assert done.returncode == 1 and "error: rank 3 (host h): waiting did not end within 1 s." in done.stderr
    with until(60, "never"):
        pass


def measured_by_rank():
    return links.measure(torch.device("cpu"), dist.group.WORLD)


def test_links_are_measured_alike_on_all_ranks(ranks):
    first, second = ranks(2, measured_by_rank)
    assert first == second and first["correct"] == 1.0
    broken = links.about("nccl", {**first, "correct": 0.0}, hosts=2)
    assert broken.level == ERROR and "wrong sums" in broken.text
    assert "over 2 hosts" in links.about("nccl", first, hosts=2).text
