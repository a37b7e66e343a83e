"""Files of launch/: shell scripts pass shellcheck, YAML is what its reader expects, and what they start is started here."""

import json
import os
import re
import signal
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.recipe.fsdp import Sharding
from losia_dist.recipe.options import check
from tests.launch.conftest import zero
from tests.launch.test_resume import assert_same_model, complete, steps_of
from tests.launch.test_script_engines import options_of, train
from tests.support.launching import BIN, ROOT, arguments
from tests.support.slurm import SCRIPT, Slurm
from tests.support.two_hosts import wait_for

LAUNCH = ROOT / "launch"
SHELL = [*sorted(LAUNCH.glob("*.sh")), SCRIPT]
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck_and_say_how_to_start_them(path):
    checked = subprocess.run([BIN / "shellcheck", "-x", "-P", ROOT, path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert path.stat().st_mode & 0o111 or path.name == "common.sh"
    named = path.name == "common.sh" or re.search(rf"^# .*launch/.*{path.name}", path.read_text(), re.MULTILINE)
    assert named, "its comment shows the command"


def accepted(words: list[str]) -> None:
    """The training script takes these options; files of this repository that they name are there and load."""
    options = options_of(words)
    check(options)
    assert options.losia and options.resume == "auto" and options.save_steps > 0
    if options.sharding:
        Sharding.parse(options.sharding).check(16)


def test_the_image_brings_a_torch_that_the_package_admits():
    image = re.search(r"^FROM pytorch/pytorch:(\d+\.\d+\.\d+)-cuda", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    bounds = next(needed for needed in map(Requirement, requires("losia_dist")) if needed.name == "torch")
    assert bounds.specifier.contains(image[1])


# Kubernetes


def test_the_train_job_is_what_kubeflow_trainer_reads():
    """The models of its API, which keep only the fields that they know."""
    from kubeflow_trainer_api import models

    text = (LAUNCH / "kubernetes" / "trainjob.yaml").read_text()
    documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
    for kind, reader in (
        ("TrainingRuntime", models.TrainerV1alpha1TrainingRuntime),
        ("TrainJob", models.TrainerV1alpha1TrainJob),
    ):
        read = json.loads(reader.from_dict(documents[kind]).to_json())
        read.get("metadata", {}).pop("creationTimestamp", None)
        assert read == documents[kind]
    job, runtime = documents["TrainJob"]["spec"], documents["TrainingRuntime"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    assert job["trainer"]["numProcPerNode"] == job["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    program, limit, script = job["trainer"]["command"]
    assert program == "torchrun" and (ROOT / script).is_file()
    from torch.distributed.run import parse_args

    parsed = parse_args([limit, script, *job["trainer"]["args"]])
    assert parsed.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    accepted(job["trainer"]["args"])


# SkyPilot


def test_the_sky_task_runs_torchrun_on_every_node(tmp_path):
    """Its fields are the schema's, and its lines, run as on the second of two nodes, give torchrun what it takes."""
    task = {"name", "num_nodes", "workdir", "resources", "volumes", "file_mounts", "envs", "secrets", "setup", "run", "config"}
    assert set(SKY) <= task
    assert set(SKY["resources"]) <= {
        "accelerators",
        "use_spot",
        "disk_size",
        "job_recovery",
        "infra",
        "image_id",
        "memory",
        "cpus",
    }
    assert set(SKY["resources"]["job_recovery"]) <= {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    assert LoSiAConfig.read(SKY["envs"]["LOSIA_CONFIG"])
    asked = {name for name, value in SKY["envs"].items() if value is None}
    variables = {**{name: value for name, value in SKY["envs"].items() if value is not None}, **dict.fromkeys(asked, "given")}
    seen = record(tmp_path, "torchrun")
    sky = {"NODE_IPS": "10.0.0.1\n10.0.0.2\n", "NODE_RANK": "1", "NUM_NODES": "2", "NUM_GPUS_PER_NODE": "8", "TASK_ID": "sky-7"}
    variables |= {f"SKYPILOT_{name}": value for name, value in sky.items()}
    # The virtual environment of `setup` is not there: the recorder answers.
    lines = SKY["run"].replace('export PATH="$PWD/.venv/bin:$PATH"', ":")
    run_shell(["bash", "-euo", "pipefail", "-c", lines], tmp_path, **variables)
    from torch.distributed.run import parse_args

    (words,) = seen()
    parsed = parse_args(words)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "10.0.0.1:29400")
    assert (parsed.local_addr, parsed.rdzv_id) == ("10.0.0.2", "sky-7")
    assert "is_host=0" in parsed.rdzv_conf and Path(parsed.training_script) == LAUNCH / "train.py"
    accepted(parsed.training_script_args)
    for name in ("setup", "run"):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{SKY[name]}")
        checked = subprocess.run([BIN / "shellcheck", tmp_path / name], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


# Shell scripts, with recorders in place of launchers


def record(directory: Path, program: str, codes: tuple[int, ...] = (0,)):
    """Put a program on the PATH (`run_shell`) that keeps its words, and ends with these codes by turns."""
    (directory / "bin").mkdir(exist_ok=True)
    kept = directory / "kept"
    kept.mkdir(exist_ok=True)
    lines = [
        "#!/usr/bin/env bash",
        f"call=$(find {kept} -name 'call-*' | wc -l)",
        f'printf "%s\\0" "$@" >{kept}/call-$call',
        f'if [ -n "${{DS_ENV_FILE:-}}" ]; then cp "$DS_ENV_FILE" {kept}/environment; fi',
        f"codes=({' '.join(map(str, codes))})",
        "exit ${codes[$call]}",
    ]
    (directory / "bin" / program).write_text("\n".join(lines) + "\n")
    (directory / "bin" / program).chmod(0o755)
    return lambda: [file.read_text().split("\0")[:-1] for file in sorted(kept.glob("call-*"))]


def run_shell(command, directory, code=0, **environment) -> str:
    variables = {**os.environ, "PATH": f"{directory / 'bin'}:{BIN}:{os.environ['PATH']}", **environment}
    process = subprocess.Popen(
        command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        raise
    assert process.returncode == code, output + errors
    return errors


WORDS = ["--model", "m", "--train_file", "f", "--output_dir", "o o"]


def test_the_deepspeed_script_starts_a_lost_run_again_and_carries_the_network_settings(tmp_path):
    seen = record(tmp_path, "deepspeed", codes=(75, 255, 0))
    (tmp_path / "hostfile").write_text("# nodes\n\nhead slots=8\nother slots=8\n")
    settings = {"HOSTFILE": str(tmp_path / "hostfile"), "PAUSE": "0", "NETWORK_INTERFACE": "eth7", "HF_TOKEN": "secret"}
    said = run_shell(["launch/deepspeed.sh", "--deepspeed", zero(3), *WORDS], tmp_path, **settings)
    assert said.count("the run ended with code") == 2
    calls = seen()
    assert len(calls) == 3 and calls[0] == calls[2]
    place = calls[0].index(str(LAUNCH / "train.py"))
    assert calls[0][:place] == [
        "--hostfile", str(tmp_path / "hostfile"), "--launcher", "pdsh", "--master_addr", "head", "--master_port", "29500",
    ]  # fmt: skip
    accepted(calls[0][place + 1 :])
    carried = (tmp_path / "kept" / "environment").read_text()
    assert "NCCL_SOCKET_IFNAME=eth7\n" in carried and "GLOO_SOCKET_IFNAME=eth7\n" in carried and "NCCL_DEBUG=WARN\n" in carried
    assert "secret" not in carried


@pytest.mark.parametrize("code", [2, 143])
def test_the_deepspeed_script_does_not_start_a_refused_or_ended_run_again(tmp_path, code):
    seen = record(tmp_path, "deepspeed", codes=(code,))
    run_shell(["launch/deepspeed.sh", *WORDS], tmp_path, code=code, HOSTFILE="launch/hostfile", PAUSE="0")
    assert len(seen()) == 1


def test_the_deepspeed_script_does_not_start_again_what_was_told_to_end(tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "deepspeed"
    program.write_text(f"#!/bin/bash\ntrap 'exit 1' TERM\necho started >>{tmp_path}/started\nwhile true; do sleep 0.1; done\n")
    program.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOSTFILE": "launch/hostfile", "PAUSE": "0"}
    script = subprocess.Popen(["launch/deepspeed.sh", *WORDS], env=variables, cwd=ROOT)
    wait_for((tmp_path / "started").exists, 20, lambda: "")
    script.terminate()
    assert script.wait(20) == 143
    assert (tmp_path / "started").read_text() == "started\n"


def test_the_accelerate_script_gives_every_node_its_number(tmp_path):
    seen = record(tmp_path, "accelerate")
    settings = {
        "NODE": "1",
        "NODES": "2",
        "GPUS": "4",
        "HEAD": "10.0.0.1",
        "CONFIG": "configs/accelerate/zero3-multi-node.yaml",
    }
    run_shell(["launch/accelerate.sh", *WORDS], tmp_path, **settings)
    from accelerate.commands.launch import launch_command_parser

    ((command, *words),) = seen()
    parsed = launch_command_parser().parse_args(words)
    assert (command, parsed.machine_rank, parsed.num_machines, parsed.num_processes) == ("launch", 1, 2, 8)
    assert (parsed.main_process_ip, parsed.main_process_port, Path(parsed.training_script)) == (
        "10.0.0.1",
        29500,
        LAUNCH / "train.py",
    )
    accepted(parsed.training_script_args)


@pytest.mark.parametrize("script, missing", [("torchrun.sh", "NODES"), ("deepspeed.sh", "HOSTFILE"), ("accelerate.sh", "NODE")])
def test_a_script_names_the_variable_that_it_lacks(tmp_path, script, missing):
    (tmp_path / "bin").mkdir()
    assert re.search(rf"{missing}: \w", run_shell([f"launch/{script}"], tmp_path, code=1))


# Shell scripts, for real: two ranks on this machine


def steps(directory: Path) -> list[int]:
    return steps_of(directory) if (directory / "metrics.jsonl").exists() else []


REAL = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HEAD": "localhost"}


@pytest.mark.slow
def test_the_torchrun_script_trains(launched, material, tmp_path):
    (tmp_path / "bin").mkdir()
    words = arguments(material, tmp_path / "run", eval_steps=2)
    run_shell(["launch/torchrun.sh", *words], tmp_path, NODES="1", GPUS="2", PORT="0", **REAL)
    assert_same_model(tmp_path / "run", launched("torchrun DDP").directory)
    assert complete(tmp_path / "run") == [8]


@pytest.mark.slow
def test_the_deepspeed_script_trains(launched, material, tmp_path):
    """With stand-ins for ssh and pdsh that stay on this machine; tests/launch/test_two_hosts.py uses the real ones."""
    record(tmp_path, "ssh")
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.write_text('#!/bin/bash\nwhile [ "$1" != -w ]; do shift; done; shift 2\nwords="$*"\nexec bash -c "${words//%n/0}"\n')
    pdsh.chmod(0o755)
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    words = arguments(material, tmp_path / "run", deepspeed=zero(2))
    settings = {**REAL, "HOSTFILE": str(tmp_path / "hostfile"), "PORT": "29641", "RESTARTS": "0"}
    run_shell(["launch/deepspeed.sh", *words], tmp_path, **settings)
    assert_same_model(tmp_path / "run", launched("deepspeed ZeRO-2").directory)


@pytest.mark.slow
def test_the_accelerate_script_trains(launched, material, tmp_path):
    (tmp_path / "bin").mkdir()
    in_fp32 = (ROOT / "configs" / "accelerate" / "fsdp2-multi-node.yaml").read_text().replace(": bf16", ": 'no'")
    (tmp_path / "fsdp2.yaml").write_text(in_fp32)
    words = arguments(material, tmp_path / "run", eval_steps=3)
    settings = {**REAL, "NODE": "0", "NODES": "1", "GPUS": "2", "PORT": "29642", "CONFIG": str(tmp_path / "fsdp2.yaml")}
    run_shell(["launch/accelerate.sh", *words], tmp_path, **settings)
    assert_same_model(tmp_path / "run", launched("accelerate FSDP2").directory)


# SLURM


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path / "slurm", job=os.getpid())


def test_the_slurm_script_asks_for_what_its_comments_say():
    lines = [line.split(" ", 1)[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    asked = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    assert asked["signal"] == "B:USR1@600" and "requeue" in asked and asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]


# (exit code of the ranks, times queued again before, queued again now)
@pytest.mark.parametrize("code, restarts, again", [(0, 0, 0), (2, 0, 0), (75, 0, 1), (137, 4, 1), (75, 5, 0), (143, 0, 0)])
def test_the_slurm_script_queues_again_what_a_restart_can_mend(slurm, code, restarts, again):
    """143 without word of the time limit: preempted, which SLURM sees to itself, or cancelled."""
    slurm.replace("losia-dist", f'#!/bin/sh\n[ "$1" = doctor ] || exit {code}\n')
    assert slurm.start(*WORDS, restarts=restarts).wait(30) == code
    assert slurm.requeued == again, slurm.log


def test_the_slurm_script_does_not_train_where_the_doctor_finds_an_error(slurm):
    slurm.replace("losia-dist", '#!/bin/sh\n[ "$1" = doctor ] && exit 1\necho trained\n')
    assert slurm.start(*WORDS).wait(30) == 1
    assert "trained" not in slurm.log and slurm.requeued == 0


@pytest.mark.slow
def test_a_slurm_job_near_its_time_limit_saves_is_queued_again_and_goes_on(slurm, ranks, material, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    long = {"max_steps": 40, "eval_file": None}
    words = arguments(material, run, **long)
    job = slurm.start(*words)
    wait_for(lambda: len(steps(run)) >= 3 or job.poll() is not None, 120, lambda: slurm.log)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 143, slurm.log
    assert slurm.requeued == 1
    assert "gloo" in slurm.log and "2 ranks: errors 0" in slurm.log  # the doctor, before
    (saved,) = complete(run)
    assert 3 <= saved < 40 and f"SIGTERM after step {saved} of 40" in slurm.log
    assert slurm.start(*words, restarts=1, DOCTOR="0").wait(120) == 0, slurm.log
    assert f"after step {saved} of 40" in slurm.log and slurm.requeued == 1
    ranks(2, train, arguments(material, whole, **long))
    assert_same_model(run, whole)
    assert steps(run) == list(range(1, 41))


def test_scripts_read_nothing_that_is_not_there():
    """Files that comments and commands of launch/ name are in the repository."""
    for path in [*SHELL, *LAUNCH.glob("*.yaml"), *LAUNCH.glob("kubernetes/*.yaml"), LAUNCH / "hostfile"]:
        for named in re.findall(r"(?<![\w/])((?:launch|configs)/[\w./-]+\w)", path.read_text()):
            assert (ROOT / named).exists() or "*" in named, f"{path.name}: {named}"
