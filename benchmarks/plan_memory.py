"""The plan against the memory of real processes: one training step on the CPU, in one process (ddp) and under FSDP2.

    python -m benchmarks.plan_memory [--layers 8 --hidden 1024 ...] [--json FILE]

Method: every rank is a process of its own with torch, Transformers and the package loaded, its process group made and a small
model trained once, so that libraries have allocated what they keep. From there on a thread reads the process's anonymous
memory (RssAnon of /proc/self/status) every 2 ms, while the model is made, wrapped and trained for two steps with one layer
localizing. The growth is compared with the plan's peak. The C library is told to hand large blocks back at once
(MALLOC_MMAP_THRESHOLD_), or its reuse of freed blocks would be measured. gloo works on a copy of what it reduce-scatters, NCCL
does not: where embedding and output layer train, that copy is added to the plan.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from benchmarks.common import header, on_ranks, table, write_json
from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.optim.dense_groups import dense_parameter_groups
from losia_dist.tools.plan.in_flight import FP32
from losia_dist.tools.plan.memory import plan_memory
from losia_dist.tools.plan.shapes import ModelShape
from losia_dist.tools.plan.workload import Cluster, Workload

TINY = ModelShape("tiny", "llama", 2, 64, 128, 4, 4, 16, 128, 64, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 8, "hidden": 1024, "intermediate": 2816, "heads": 16, "kv-heads": 16, "vocabulary": 32000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--json")
    given = parser.parse_args()
    shape = ModelShape(
        "measured",
        "llama",
        given.layers,
        given.hidden,
        given.intermediate,
        given.heads,
        given.kv_heads,
        given.hidden // given.heads,
        given.vocabulary,
        2048,
        False,
    )
    print(header())
    print(f"{shape.parameters:,} parameters, bf16, {given.sequence} tokens")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    rows, results = [], []
    for ranks, method, checkpointing in ((1, "losia", True), (1, "losia", False), (2, "losia", True), (2, "full", True)):
        cluster = Cluster(gpus_per_node=ranks, reserve=0)
        engine = "ddp" if ranks == 1 else "fsdp2"
        workload = Workload(shape, cluster, engine, method, given.sequence, checkpointing=checkpointing)
        copied = FP32 * shape.outer_parameters if ranks > 1 and method == "full" else 0
        planned, measured = plan_memory(workload).peak + copied, on_ranks(ranks, measure, workload)
        name = (
            f"{'one process' if ranks == 1 else 'FSDP2, 2 ranks'}, {method}, checkpointing {'on' if checkpointing else 'off'}"
        )
        rows.append([name, f"{planned / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{planned / measured - 1:+.1%}"])
        results.append({"run": name, "planned": planned, "measured": measured})
    print(table(["run", "planned, MB", "measured, MB", "plan against measurement"], rows))
    write_json(given.json, results)


def measure(workload: Workload) -> int:
    """Growth of this rank's anonymous memory over two steps, in bytes, at its highest."""
    ranks = dist.get_world_size()
    train(Workload(TINY, Cluster(gpus_per_node=ranks, reserve=0), workload.engine, workload.method, 32), sampled=False)
    gc.collect()
    return train(workload, sampled=True)


def train(workload: Workload, sampled: bool) -> int:
    """Make, wrap and train a workload's model."""
    started, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    if sampled:
        watcher.start()
    config = LoSiAConfig()
    torch.manual_seed(0)  # the same weights on every rank
    model: Any = AutoModelForCausalLM.from_config(
        workload.shape.configuration(), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.train()
    if workload.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if workload.method == "losia":
        get_losia_model(model, config)
    if workload.engine == "fsdp2":
        for unit in [*model.model.layers, model]:
            fully_shard(unit, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    groups = (losia_parameter_groups if workload.method == "losia" else dense_parameter_groups)(model, lr=1e-4)
    optimizer = LoSiAAdamW(groups, lr=1e-4)
    optimizer.create_state()
    losia = LoSiA(model, optimizer, config) if workload.method == "losia" else None
    tokens = torch.randint(0, workload.shape.vocabulary, (workload.micro_batch, workload.sequence))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        if losia is not None:
            losia.step()
        optimizer.zero_grad(set_to_none=True)
    if losia is not None:
        losia.detach()
    if sampled:
        over.set()
        watcher.join()
    return peak[0] - started


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
