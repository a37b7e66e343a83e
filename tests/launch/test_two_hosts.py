"""Training across two hosts: the losses of one host, and what becomes of a run whose network or whose other host is lost."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.launch.test_resume import complete
from tests.launch.test_script_engines import train
from tests.support.launching import ROOT, arguments
from tests.support.two_hosts import BIN, NAMES, TwoHosts, missing, wait_for

needs_hosts = pytest.mark.skipif(bool(why := missing()), reason=why or "-")
needs_ssh = pytest.mark.skipif(bool(why := missing("sshd", "ssh", "ssh-keygen", "pdsh")), reason=why or "-")
pytestmark = needs_hosts

# The engine's options, and the run on one host (tests/launch/conftest.py) with the same global batches.
ENGINES = {
    "FSDP2": ({"sharding": "fsdp2"}, "accelerate FSDP2"),
    "accelerate FSDP2": ({}, "accelerate FSDP2"),
    "ZeRO-3": ({"deepspeed": ROOT / "configs" / "deepspeed" / "zero3.json"}, "deepspeed ZeRO-3"),
}
STEPS = 40


@pytest.fixture
def hosts(tmp_path):
    with TwoHosts(tmp_path) as made:
        yield made


def start(hosts, launcher, material, directory, settings=None, **options):
    """One rank a host; returns the launchers' processes, that of the first host first."""
    words = arguments(material, directory, **options)
    common = {"HEAD": NAMES[0], "RESTARTS": "0", **(settings or {})}
    if launcher != "deepspeed":
        common |= {"NODES": "2", "GPUS": "1", "CONFIG": str(hosts.directory / "accelerate.yaml")}
        in_fp32 = (ROOT / "configs" / "accelerate" / "fsdp2-multi-node.yaml").read_text().replace(": bf16", ": 'no'")
        (hosts.directory / "accelerate.yaml").write_text(in_fp32)
        command = [f"launch/{launcher}.sh", *words]
        return [hosts.start(host, command, f"log-{host}", NODE=str(host), **common) for host in (0, 1)]
    ssh = hosts.serve_ssh()
    hostfile = hosts.directory / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    path = f"{ssh}:{BIN}:{os.environ['PATH']}:/usr/sbin"
    return [hosts.start(0, ["launch/deepspeed.sh", *words], "log-0", HOSTFILE=str(hostfile), PATH=path, **common)]


def metrics(directory: Path, name: str) -> dict[int, float]:
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line[name] for line in values if name in line}


def logs(hosts) -> str:
    return "\n".join(f"=== {log.name}\n{hosts.text(log.name)}" for log in sorted(hosts.directory.glob("log-*")))


def finish(hosts, processes, seconds=150):
    wait_for(lambda: all(process.poll() is not None for process in processes), seconds, lambda: logs(hosts))
    assert [process.returncode for process in processes] == [0] * len(processes), logs(hosts)[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, engine",
    [
        ("torchrun", "FSDP2"),
        ("torchrun", "ZeRO-3"),
        ("accelerate", "accelerate FSDP2"),
        pytest.param("deepspeed", "FSDP2", marks=needs_ssh),
        pytest.param("deepspeed", "ZeRO-3", marks=needs_ssh),
    ],
)
def test_two_hosts_train_as_one(hosts, launched, material, tmp_path, launcher, engine):
    options, on_one_host = ENGINES[engine]
    directory = tmp_path / "run"
    finish(hosts, start(hosts, launcher, material, directory, **options))
    expected = launched(on_one_host)
    assert list(metrics(directory, "loss").values()) == pytest.approx(expected.values("loss"), abs=1e-5)
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["ranks"], summary["engine"]) == (2, expected.summary["engine"])


LONG = {"max_steps": STEPS, "eval_file": None, "save_steps": 5}


@pytest.fixture(scope="module")
def undisturbed(ranks, material, tmp_path_factory):
    """Losses by step of the run on one host that nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    ranks(2, train, arguments(material, directory, sharding="fsdp2", **{**LONG, "save_steps": 0}))
    return metrics(directory, "loss")


def wait_for_step(hosts, directory, step, processes):
    def reached():
        assert all(process.poll() is None for process in processes), logs(hosts)[-6000:]
        return step in metrics(directory, "loss")

    wait_for(reached, 120, lambda: logs(hosts))


@pytest.mark.slow
def test_a_run_outlives_a_short_cut(hosts, undisturbed, material, tmp_path):
    directory = tmp_path / "run"
    processes = start(hosts, "torchrun", material, directory, sharding="fsdp2", **LONG)
    wait_for_step(hosts, directory, 12, processes)
    hosts.cut()
    before = metrics(directory, "loss")
    with pytest.raises(AssertionError, match="not within 8 s"):
        wait_for(lambda: len(metrics(directory, "loss")) > len(before) + 2, 8, lambda: "")
    hosts.mend()
    finish(hosts, processes)
    assert metrics(directory, "loss") == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher, engine", [("torchrun", "FSDP2"), pytest.param("deepspeed", "ZeRO-3", marks=needs_ssh)])
@pytest.mark.parametrize("trouble", ["cut", "power off"])
def test_a_lost_host_ends_the_run_within_a_minute_and_it_goes_on_from_its_checkpoint(
    hosts, undisturbed, material, tmp_path, launcher, engine, trouble
):
    """With the settings that a user has: the watch's patience is 30 s."""
    directory = tmp_path / "run"
    options = {**ENGINES[engine][0], **LONG}
    processes = start(hosts, launcher, material, directory, **options)
    wait_for_step(hosts, directory, 12, processes)
    hosts.cut() if trouble == "cut" else hosts.power_off(1)
    said = wait_for(lambda: "rank 1 (host node-b" in hosts.text("log-0"), 60, lambda: logs(hosts))
    assert "has been silent for 3" in hosts.text("log-0")
    ended = said + wait_for(lambda: processes[0].poll() is not None, 60 - said, lambda: logs(hosts))
    assert processes[0].returncode != 0
    print(f"{launcher}, {engine}, {trouble}: said after {said:.1f} s, the launcher of {NAMES[0]} ended after {ended:.1f} s")
    print(hosts.text("log-0")[-3000:])
    saved = complete(directory)
    assert saved and saved[-1] <= max(metrics(directory, "loss")) < STEPS
    assert not (directory / "summary.json").exists()
    hosts.end_all()
    hosts.mend()
    for log in hosts.directory.glob("log-*"):
        log.unlink()
    finish(hosts, start(hosts, launcher, material, directory, **options))
    assert f"step-{saved[-1]:08d}, after step {saved[-1]} of {STEPS}" in hosts.text("log-0")
    assert metrics(directory, "loss") == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again_where_one_was_killed(hosts, undisturbed, material, tmp_path):
    directory = tmp_path / "run"
    processes = start(hosts, "torchrun", material, directory, {"RESTARTS": "1"}, sharding="fsdp2", **LONG)
    wait_for_step(hosts, directory, 12, processes)
    (rank,) = hosts.find(1, "RANK=1")
    os.kill(rank, signal.SIGKILL)
    finish(hosts, processes)
    assert "rank 1 (host node-b" in hosts.text("log-0") and "going on from" in hosts.text("log-0")
    assert metrics(directory, "loss") == pytest.approx(undisturbed, abs=1e-5)


def examine(hosts, *words, second: dict[str, str] | None = None) -> list[str]:
    """The doctor on both hosts, one rank each; what each of them said."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": NAMES[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
    command = ["losia-dist", "doctor", "--seconds", "15", *words]
    processes = [
        hosts.start(host, command, f"log-{host}", RANK=str(host), **place, **(second or {} if host else {})) for host in (0, 1)
    ]
    wait_for(lambda: all(process.poll() is not None for process in processes), 90, lambda: logs(hosts))
    said = [hosts.text(f"log-{host}") for host in (0, 1)]
    for log in hosts.directory.glob("log-*"):
        log.unlink()
    return [f"{process.returncode}: {text}" for process, text in zip(processes, said, strict=True)]


@pytest.mark.slow
def test_the_doctor_measures_the_link_and_names_a_host_that_does_not_answer_or_differs(hosts, tmp_path):
    (tmp_path / "other" / "tqdm-4.65.0.dist-info").mkdir(parents=True)
    (tmp_path / "other" / "tqdm-4.65.0.dist-info" / "METADATA").write_text("Name: tqdm\nVersion: 4.65.0\n")
    first, second = examine(hosts, second={"PYTHONPATH": str(tmp_path / "other")})
    assert first.startswith("1: ") and second.startswith("1: ") and "error" not in second  # one voice
    assert "all-reduce over 2 hosts" in first and "GB/s" in first
    assert re.search(r"the version of tqdm differs: [\d.]+ on rank 0 \(node-a\); 4.65.0 on rank 1 \(node-b\)", first)
    print(first)
    hosts.cut()
    first, second = examine(hosts)
    assert "rank 1 of 2 did not come within 15 s; rank 0 did (hosts node-a)" in first
    assert "error    meeting  rank 1 (host node-b) cannot reach node-a:29500 within 15 s" in second
    print(first, second)
