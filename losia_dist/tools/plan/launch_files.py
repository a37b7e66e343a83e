"""Files to start a planned run with: DeepSpeed's configuration, LoSiA's, and the command, as `losia-dist train` takes them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from losia_dist.errors import ConfigError
from losia_dist.tools.plan.workload import Workload

# As in configs/deepspeed, which a test holds these to.
_COMMON: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True}
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
    if workload.method == "lora":
        raise ConfigError(
            "--output with --method lora: losia-dist trains subnets or all weights; LoRA is there to compare with."
        )
    files: dict[str, str] = {}
    if workload.engine in _ZERO:
        files["deepspeed.json"] = json.dumps(deepspeed_settings(workload), indent=2) + "\n"
    if workload.method == "losia":
        files["losia.yaml"] = yaml.safe_dump(workload.config.to_dict(), sort_keys=False)
    files["launch.sh"] = launch_script(workload, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        (directory / "launch.sh").chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--output {directory} cannot be written: {error.strerror}.") from error
    return [directory / name for name in files]


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
    """A shell script to run on every node; MODEL, TRAIN_FILE and, on several nodes, MASTER_ADDR and NODE_RANK are set by
    the caller."""
    cluster, here = workload.cluster, shlex.quote(str(directory))
    several = cluster.nodes > 1
    nodes = f' --nnodes {cluster.nodes} --node_rank "${{NODE_RANK:?}}" --master_addr "${{MASTER_ADDR:?}}"' if several else ""
    sharding = {"ddp": "", "fsdp2": " --sharding fsdp2", "hsdp": f" --sharding hsdp:{workload.shards}"}
    engine = sharding.get(workload.engine, f" --deepspeed {here}/deepspeed.json")
    if workload.engine in sharding and workload.offload == "all":
        engine += " --offload"
    method = f" --losia --losia_config {here}/losia.yaml" if workload.method == "losia" else ""
    model = shlex.quote(workload.shape.source) if workload.shape.source else '"${MODEL:?directory or hub name}"'
    where = "every node, with MASTER_ADDR and its own NODE_RANK" if several else "the node"
    options = {
        "precision": "bf16",
        "max_length": workload.sequence,
        "micro_batch": workload.micro_batch,
        "gradient_accumulation": workload.accumulation,
        "gradient_checkpointing": "non-reentrant" if workload.checkpointing else "off",
    }
    if workload.sequence_ranks > 1:
        options["sequence_parallel"] = workload.sequence_ranks
    if workload.chunked_loss:
        options["loss"] = "chunked"
    if workload.activation_offload:
        options["gradient_checkpointing"] = "offloaded"
    return (
        f"#!/usr/bin/env bash\n# {workload.shape.name}, {workload.method}, {workload.engine} on {cluster.nodes} x "
        f"{cluster.gpus_per_node} GPUs. Run on {where}, from the project's directory.\nset -euo pipefail\n"
        f"exec torchrun --nproc_per_node {cluster.gpus_per_node}{nodes} launch/train.py{method}{engine} \\\n"
        f'  --model {model} --train_file "${{TRAIN_FILE:?}}" --output_dir "${{OUTPUT_DIR:-runs/planned}}" \\\n'
        f'  {" ".join(f"--{name} {value}" for name, value in options.items())} "$@"\n'
    )
