"""Files to start a planned run with: a run file with LoSiA's settings in it, DeepSpeed's configuration, and the command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.tools.plan.workload import Workload

# As in configs/deepspeed, which a test holds these to.
_COMMON: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True}
_ALWAYS = ("rank_factor", "period", "layers_per_slot")  # settings that people look for
_ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, **_COMMON},
    "zero3": {
        "stage": 3,
        **_COMMON,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    },
}


def write_launch(workload: Workload, directory: Path) -> list[Path]:
    """Write the files of one plan into a directory (made if missing); returns their paths, the command's last.

    Raises:
        ConfigError: LoRA, which the training script does not train, or a directory that cannot be written.
    """
    files: dict[str, str] = {}
    if workload.engine in _ZERO:
        files["deepspeed.json"] = json.dumps(deepspeed_settings(workload), indent=2) + "\n"
    files["run.yaml"] = run_text(run_options(workload, directory), f"{_head(workload)} Started by launch.sh.")
    files["launch.sh"] = launch_script(workload, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        (directory / "launch.sh").chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--output {directory} cannot be written: {error.strerror}.") from error
    return [directory / name for name in files]


def run_options(workload: Workload, directory: Path) -> dict[str, Any]:
    """The options of `losia-dist train` that a plan decides, as a run file holds them.

    directory: of deepspeed.json, where the engine needs it.

    Raises:
        ConfigError: LoRA.
    """
    if workload.method == "lora":
        raise ConfigError(
            "--output with --method lora: losia-dist trains subnets or all weights; LoRA is there to compare with."
        )
    options: dict[str, Any] = {"model": workload.shape.source} if workload.shape.source else {}
    if workload.method == "losia":
        options |= {"losia": True, "losia_config": _without_defaults(workload.config.to_dict())}
    if workload.quantization is not None:
        options["quantization"] = workload.quantization
    sharding = {"fsdp2": "fsdp2", "hsdp": f"hsdp:{workload.shards}"}
    if workload.engine in sharding:
        options["sharding"] = sharding[workload.engine]
        options |= {"offload": True} if workload.offload == "all" else {}
    elif workload.engine in _ZERO:
        options["deepspeed"] = str(directory / "deepspeed.json")
    if workload.sequence_ranks > 1:
        options["sequence_parallel"] = workload.sequence_ranks
    if workload.chunked_loss:
        options["loss"] = "chunked"
    kind = "offloaded" if workload.activation_offload else "non-reentrant"
    return options | {
        "precision": "bf16",
        "max_length": workload.sequence,
        "micro_batch": workload.micro_batch,
        "gradient_accumulation": workload.accumulation,
        "gradient_checkpointing": kind if workload.checkpointing else "off",
    }


def run_text(options: dict[str, Any], comment: str) -> str:
    """A run file."""
    return f"# {comment}\n" + yaml.safe_dump(options, sort_keys=False, width=120)


def launcher(workload: Workload) -> str:
    """The words that start `losia-dist train` on every GPU of a node; on one GPU alone none."""
    cluster = workload.cluster
    if cluster.gpus == 1:
        return "losia-dist train"
    several = cluster.nodes > 1
    nodes = f' --nnodes {cluster.nodes} --node_rank "${{NODE_RANK:?}}" --master_addr "${{MASTER_ADDR:?}}"' if several else ""
    return f"torchrun --nproc_per_node {cluster.gpus_per_node}{nodes} -m losia_dist train"


def _without_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """What says something: an empty mapping would be the published settings."""
    default = LoSiAConfig().to_dict()
    return {name: value for name, value in settings.items() if value != default[name] or name in _ALWAYS}


def _head(workload: Workload) -> str:
    cluster = workload.cluster
    return f"{workload.shape.name}, {workload.method}, {workload.engine} on {cluster.nodes} x {cluster.gpus_per_node} GPUs."


def deepspeed_settings(workload: Workload) -> dict[str, Any]:
    """DeepSpeed's configuration; batch sizes and clipping come from the script's options."""
    zero = dict(_ZERO[workload.engine])
    settings: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": zero}
    if workload.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        settings["zero_force_ds_cpu_optimizer"] = False  # LoSiAAdamW steps on the host too
    if workload.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return settings | {"steps_per_print": 1_000_000_000}


def launch_script(workload: Workload, directory: Path) -> str:
    """A shell script to run on every node; TRAIN_FILE, MODEL where the plan knows none and, on several nodes, MASTER_ADDR and
    NODE_RANK are set by the caller. It needs the installed package and nothing of the repository."""
    model = "" if workload.shape.source else ' --model "${MODEL:?directory or hub name}"'
    where = "every node, with MASTER_ADDR and its own NODE_RANK" if workload.cluster.nodes > 1 else "the node"
    return (
        f"#!/usr/bin/env bash\n# {_head(workload)} Run on {where}; options that are given to it win.\nset -euo pipefail\n"
        f"exec {launcher(workload)} {shlex.quote(str(directory / 'run.yaml'))}{model} \\\n"
        f'  --train_file "${{TRAIN_FILE:?}}" --output_dir "${{OUTPUT_DIR:-runs/planned}}" "$@"\n'
    )
