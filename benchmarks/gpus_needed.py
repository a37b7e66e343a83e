"""How many GPUs a mixture of experts needs at least, by method: plans of growing clusters until one fits.

    python -m benchmarks.gpus_needed [--models qwen3-30b-a3b ...] [--memory 80] [--lora-rank 16] [--json FILE]

Up to 8 GPUs of one node, then whole nodes, to 128 of them; a single GPU without sharding, more with FSDP2. Sequence 4096,
micro-batch 1, activation checkpointing, drawn and located subnets of 1/8 x 1/8. A cell has the number of GPUs and the planned
GB of each, with the reserve. Where FSDP2 does not fit on any of these, HSDP (copies over fewer ranks) and ZeRO-3 are tried, and
named. Nothing is run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.common import header, table, write_json
from losia_dist import LoSiAConfig
from losia_dist.tools.plan.memory import plan_memory
from losia_dist.tools.plan.shapes import MIXTURES, find_shape
from losia_dist.tools.plan.workload import GB, Cluster, Workload

METHODS: dict[str, dict[str, Any]] = {
    "LoSiA, drawn": {"config": LoSiAConfig(selection="random")},
    "LoSiA, located": {"config": LoSiAConfig(selection="greedy")},
    "LoRA": {"method": "lora"},
    "full": {"method": "full"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MIXTURES))
    parser.add_argument("--memory", type=int, default=80, help="GB of one GPU")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--json")
    given = parser.parse_args()
    print(header())
    rows, results = [], []
    for model in given.models:
        found = {}
        for name, settings in METHODS.items():
            shape = find_shape(model)
            workload = Workload(shape, Cluster(memory=given.memory * GB), sequence=4096, lora_rank=given.lora_rank, **settings)
            found[name] = smallest(workload)
            results.append({"model": model, "method": name, **(found[name] or {"gpus": None})})
        rows.append([model, *map(cell, found.values())])
        print(rows[-1], flush=True)
    print(table(["GPUs, GB of each", *METHODS], rows))
    write_json(given.json, results)


def smallest(workload: Workload) -> dict[str, Any] | None:
    """The smallest cluster on which a workload fits: engine, GPUs, ranks that share one copy of the model, bytes of one GPU."""
    sizes = [*range(1, 9), *(8 * nodes for nodes in range(2, 129))]
    tried = [("ddp", 1, 1), *(("fsdp2", gpus, gpus) for gpus in sizes[1:])]
    tried += [("hsdp", gpus, ranks) for gpus in sizes for ranks in range(gpus // 2, 7, -1) if gpus % ranks == 0]
    tried += [("zero3", gpus, gpus) for gpus in sizes[1:]]
    for engine, gpus, shards in tried:
        nodes = max(1, gpus // 8)
        cluster = replace(workload.cluster, nodes=nodes, gpus_per_node=gpus // nodes)
        asked = replace(workload, cluster=cluster, engine=engine, shard_ranks=shards if engine == "hsdp" else None)
        total = plan_memory(asked).total
        if total <= cluster.memory:
            return {"engine": engine, "gpus": gpus, "shards": shards, "bytes": total}
    return None


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "none"
    name = {"hsdp": f", HSDP of {found['shards']}", "zero3": ", ZeRO-3"}.get(found["engine"], "")
    return f"{found['gpus']} ({found['bytes'] / GB:.0f}{name})"


if __name__ == "__main__":
    main()
