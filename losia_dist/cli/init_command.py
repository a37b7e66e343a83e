"""`losia-dist init`: a run file for a model on so many GPUs, from the plan's recommendation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from losia_dist.cli.plan_command import add_plan_arguments, advised_workload
from losia_dist.digits import short
from losia_dist.errors import ConfigError
from losia_dist.tools.plan.workload import GB

_PASSED = ("nodes", "gpu_memory", "gpu", "sequence_length", "micro_batch", "gradient_accumulation", "steps", "losia_config")


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist init`; what it does not ask for is as in `losia-dist plan`."""
    parser.add_argument("--model", required=True, help="directory or hub name of a causal language model")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a node (1)")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU, 10^9 bytes (80)")
    parser.add_argument("--gpu", default="h100", help="for the choice of the fastest engine (h100)")
    parser.add_argument("--train_file", nargs="+", metavar="SOURCE", default=["train.jsonl"], help="of the run (train.jsonl)")
    parser.add_argument("--sequence-length", type=int, help="tokens of a row (2048, or the model's own limit below it)")
    parser.add_argument("--micro-batch", type=int, default=1, help="rows of one GPU's forward pass (1)")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="forward passes per optimizer step (1)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the run (three epochs)")
    parser.add_argument("--losia_config", metavar="NAME|FILE", help="LoSiA's settings (chosen by the run's length)")
    parser.add_argument("--output_dir", default="runs/first", help="of the run (runs/first)")
    parser.add_argument("--output", default="run.yaml", metavar="FILE", help="the run file (run.yaml)")


def run_init(options: argparse.Namespace) -> int:
    """Write the run file, and say how it is started. Raises: ConfigError, where nothing fits or a file is there already."""
    from losia_dist.tools.plan.launch_files import deepspeed_settings, launcher, run_options, run_text

    target = Path(options.output)
    if target.exists():
        raise ConfigError(f"--output {target} is there already: move it away, or give another name.")
    planner = argparse.ArgumentParser()
    add_plan_arguments(planner)
    asked = planner.parse_args(["--model", options.model, "--gpus-per-node", str(options.gpus)])
    for name in _PASSED:
        setattr(asked, name, getattr(options, name))
    plan = advised_workload(asked)
    workload = plan.workload
    if workload.shape.source is None:
        raise ConfigError(f"--model {options.model} is a shape that losia-dist plan knows: give a directory or a hub name.")
    chosen = run_options(workload, target.parent)
    if options.losia_config is None:
        del chosen["losia_config"]  # --losia alone takes the settings that fit the run's length
    else:
        chosen["losia_config"] = options.losia_config
    chosen |= {"train_file": options.train_file, "output_dir": options.output_dir}
    chosen |= {"max_steps": options.steps} if options.steps is not None else {}
    about = (
        f"{workload.shape.name} on {workload.cluster.nodes} x {workload.cluster.gpus_per_node} GPUs: "
        f"{short(plan.memory.total / GB)} of {short(workload.cluster.memory / GB)} GB, {short(plan.seconds)} s a step, planned."
    )
    command = f"{launcher(workload)} {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if "deepspeed" in chosen:
            Path(chosen["deepspeed"]).write_text(json.dumps(deepspeed_settings(workload), indent=2) + "\n", encoding="utf-8")
        target.write_text(run_text(chosen, f"{about}\n# Start: {command}"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {target} cannot be written: {error.strerror}.") from error
    print(f"{about}\nwritten: {target}\nstart it: {command}")
    return 0
