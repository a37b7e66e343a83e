"""A plan as text: Markdown tables, so that they can be pasted into documentation as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from losia_dist.digits import short
from losia_dist.tools.plan.memory import PARTS
from losia_dist.tools.plan.workload import GB, Workload
from losia_dist.tools.plan.workload_plan import Plan

# Rows about one step: name, and the text of a plan's record.
_STEP: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters that train": lambda r: f"{r['trained_parameters']:,}",
    "sent for weights, GB": lambda r: short(r["traffic_bytes"]["weights"] / GB),
    "sent for gradients, GB": lambda r: short(r["traffic_bytes"]["gradients"] / GB),
    "sent for localization, GB": lambda r: short(r["traffic_bytes"]["localization"] / GB),
    "sent for attention, GB": lambda r: short(r["traffic_bytes"]["sequence"] / GB),
    "of it between nodes, GB": lambda r: short(r["traffic_bytes"]["between_nodes"] / GB),
    "operations, TFLOP": lambda r: short(r["flops"]["total"] / 1e12),
    "computing, s": lambda r: short(r["seconds"]["compute"]),
    "transfers, s": lambda r: short(r["seconds"]["transfers"]),
    "tokens per second, cluster": lambda r: short(r["tokens_per_second"]),
    "activations to the host and back, GB": lambda r: short(r["traffic_bytes"]["host"] / GB),
    "checkpoint of a step, GB": lambda r: short(r["disk_bytes"]["step"] / GB),
    "host memory per node, GB": lambda r: short(r["host_bytes_per_node"] / GB),
}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right, padded so that it reads well in a terminal too."""
    cells = [columns, *rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[f"{cell:{'>' if at else '<'}{widths[at]}}" for at, cell in enumerate(row)] for row in cells]
    lines.insert(1, ["-" * (width - 1) + (":" if at else "-") for at, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(plans: Sequence[Plan], steps: int | None) -> str:
    """Plans side by side, one column a method: memory, traffic, operations, time, disk; then the first one's schedule."""
    records = [plan.record(steps) for plan in plans]
    names = [record["method"] for record in records]
    workload = plans[0].workload
    cluster = workload.cluster
    head = (
        f"{workload.shape.name} ({short(workload.shape.parameters / 1e9)} B parameters), {workload.engine}, {cluster.nodes} x "
        f"{cluster.gpus_per_node} GPUs of {short(cluster.memory / GB)} GB, {workload.micro_batch} x {workload.sequence} "
        f"tokens, accumulation {workload.accumulation}, checkpointing {'on' if workload.checkpointing else 'off'}, offload "
        f"{workload.offload}{_long(workload)}" + (f", base in {workload.quantization}" if workload.quantization else "")
    )
    memory = [
        [meaning, *(short(record["memory"][name] / GB) for record in records)]
        for name, meaning in PARTS.items()
        if any(record["memory"][name] for record in records)
    ]
    memory.append(["planned, with reserve", *(short(plan.memory.total / GB) for plan in plans)])
    if any(plan.simulated is not None for plan in plans):
        memory.append(["simulated, with reserve", *(short((plan.peak + cluster.reserve) / GB) for plan in plans)])
    memory.append(["fits", *("yes" if plan.fits else "NO" for plan in plans)])
    parts = [
        head,
        table(["GB of one GPU", *names], memory),
        table(["one step", *names], [[name, *map(shown, records)] for name, shown in _STEP.items() if _is_said(name, records)]),
    ]
    parts.append(
        f"Rates: {cluster.gpu}, {short(cluster.peak_flops / 1e12)} TFLOP/s at {cluster.compute_efficiency:.0%}; "
        f"{short(cluster.gpu_bandwidth / GB)} GB/s inside a node, {short(cluster.node_bandwidth / GB)} GB/s a GPU between "
        f"nodes, at {cluster.link_efficiency:.0%}; transfers beside the computation."
        + (" FP8 products are timed as bf16's." if workload.config.weight_products else "")
    )
    if "schedule" in records[0]:
        parts.append(_schedule(records[0]["schedule"]))
        growth = plans[0].overlay_growth(steps)
        if growth is not None:
            parts.append(growth.describe())
        if records[0]["warm_start"] is not None:
            parts.append(_warm_start(records[0]["warm_start"]))
    return "\n\n".join(parts)


def _is_said(name: str, records: Sequence[dict[str, Any]]) -> bool:
    """Rows about long sequences stand where there is something to say."""
    about = {"sent for attention, GB": "sequence", "activations to the host and back, GB": "host"}.get(name)
    return about is None or any(record["traffic_bytes"][about] for record in records)


def _long(workload: Workload) -> str:
    """What a plan for long sequences says of them."""
    said = f", {workload.sequence_ranks} GPUs a sequence" if workload.sequence_ranks > 1 else ""
    said += ", activations on the host" if workload.activation_offload else ""
    return said + (", chunked loss" if workload.chunked_loss else "")


def _warm_start(found: dict[str, Any]) -> str:
    passes = found["passes"]
    kept, sent, gradient = (found[f"{name}_bytes"] / GB for name in ("sums", "sent_for_sums", "largest_gradient"))
    return (
        f"First subnets: {passes} pass{'es' if passes > 1 else ''} over {found['batches_per_pass']} batches a GPU, "
        f"{short(found['seconds'])} s; {short(kept)} GB of sums are kept and {short(sent)} GB sent"
        + (f", beside one full gradient at a time ({short(gradient)} GB)." if gradient else "; forward alone.")
    )


def _schedule(schedule: dict[str, Any]) -> str:
    what = "Drawing subnets anew" if schedule["selection"] == "random" else "Re-localization"
    text = (
        f"{what}: {schedule['groups']} groups, period {schedule['period']}, {schedule['layers_per_slot']} a slot: a "
        f"full cycle takes {schedule['cycle_steps']:,} steps."
    )
    if schedule["layers_per_slot"] > 1 and schedule["selection"] != "random":
        text += " Half the period and half as many layers a slot take as long, with half of the averages."
    if "steps" not in schedule:
        return text
    advised, cycles = schedule["recommended_layers_per_slot"], schedule["recommended_for_cycles"]
    wanted = "one full cycle" if cycles == 1 else f"{cycles} full cycles"
    advice = "shorten the period" if advised is None else f"for {wanted} use layers_per_slot: {advised}"
    return f"{text} A run of {schedule['steps']:,} steps makes {short(schedule['cycles'])} cycles; {advice}."
