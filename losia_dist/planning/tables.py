"""A plan as text: Markdown tables, so that they can be pasted into documentation as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from losia_dist.planning.memory import PARTS
from losia_dist.planning.plan import Plan
from losia_dist.planning.workload import GB


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right, padded so that it reads well in a terminal too."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if place == 0 else cell.rjust(w) for place, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if place == 0 else "-" * (w - 1) + ":" for place, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def describe(plans: Sequence[Plan], steps: int | None) -> str:
    """Plans side by side, one column a method: memory, traffic, operations, time, disk; then the first one's schedule."""
    records = [plan.record(steps) for plan in plans]
    names = [record["method"] for record in records]
    workload = plans[0].workload
    cluster = workload.cluster
    head = (
        f"{workload.shape.name} ({workload.shape.parameters / 1e9:.1f} B parameters), {workload.engine}, {cluster.nodes} x "
        f"{cluster.gpus_per_node} GPUs of {cluster.memory / GB:g} GB, {workload.micro_batch} x {workload.sequence} tokens, "
        f"accumulation {workload.accumulation}, checkpointing {'on' if workload.checkpointing else 'off'}, offload "
        f"{workload.offload}"
    )
    memory = [
        [meaning, *(f"{record['memory'][name] / GB:.2f}" for record in records)]
        for name, meaning in PARTS.items()
        if any(record["memory"][name] for record in records)
    ]
    memory.append(["planned, with reserve", *(f"{plan.memory.total / GB:.2f}" for plan in plans)])
    if any(plan.simulated is not None for plan in plans):
        memory.append(["simulated, with reserve", *(_simulated(plan) for plan in plans)])
    memory.append(["fits", *("yes" if plan.fits else "NO" for plan in plans)])
    parts = [head, table(["GB of one GPU", *names], memory), table(["one step", *names], _step_rows(records))]
    parts.append(
        f"Rates: {cluster.gpu}, {cluster.peak_flops / 1e12:.0f} TFLOP/s at {cluster.compute_efficiency:.0%}; "
        f"{cluster.gpu_bandwidth / GB:.0f} GB/s inside a node, {cluster.node_bandwidth / GB:g} GB/s a GPU between nodes, at "
        f"{cluster.link_efficiency:.0%}; transfers beside the computation."
    )
    if "schedule" in records[0]:
        parts.append(_schedule(records[0]["schedule"]))
        if records[0]["warm_start"] is not None:
            parts.append(_warm_start(records[0]["warm_start"]))
    return "\n\n".join(parts)


def _simulated(plan: Plan) -> str:
    return "" if plan.simulated is None else f"{(plan.simulated + plan.workload.cluster.reserve) / GB:.2f}"


def _step_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    def row(name: str, value: Any) -> list[str]:
        return [name, *(value(record) for record in records)]

    return [
        row("parameters that train", lambda r: f"{r['trained_parameters']:,}"),
        row("sent for weights, GB", lambda r: f"{r['traffic_bytes']['weights'] / GB:.2f}"),
        row("sent for gradients, GB", lambda r: f"{r['traffic_bytes']['gradients'] / GB:.3f}"),
        row("sent for localization, GB", lambda r: f"{r['traffic_bytes']['localization'] / GB:.3f}"),
        row("of it between nodes, GB", lambda r: f"{r['traffic_bytes']['between_nodes'] / GB:.3f}"),
        row("operations, TFLOP", lambda r: f"{r['flops']['total'] / 1e12:.0f}"),
        row("computing, s", lambda r: f"{r['seconds']['compute']:.2f}"),
        row("transfers, s", lambda r: f"{r['seconds']['transfers']:.2f}"),
        row("tokens per second, cluster", lambda r: f"{r['tokens_per_second']:,.0f}"),
        row("checkpoint of a step, GB", lambda r: f"{r['disk_bytes']['step'] / GB:.2f}"),
        row("host memory per node, GB", lambda r: f"{r['host_bytes_per_node'] / GB:.1f}"),
    ]


def _warm_start(found: dict[str, Any]) -> str:
    passes = found["passes"]
    kept, sent, gradient = (found[f"{name}_bytes"] / GB for name in ("sums", "sent_for_sums", "largest_gradient"))
    return (
        f"First subnets: {passes} pass{'es' if passes > 1 else ''} over {found['batches_per_pass']} batches a GPU, "
        f"{found['seconds']:.0f} s; {kept:.3f} GB of sums are kept and {sent:.3f} GB sent"
        + (f", beside one full gradient at a time ({gradient:.2f} GB)." if gradient else "; forward alone.")
    )


def _schedule(schedule: dict[str, Any]) -> str:
    text = (
        f"Re-localization: {schedule['groups']} groups, period {schedule['period']}, {schedule['layers_per_slot']} a slot: a "
        f"full cycle takes {schedule['cycle_steps']:,} steps."
    )
    if schedule["layers_per_slot"] > 1 and schedule["selection"] != "random":
        text += " Half the period and half as many layers a slot take as long, with half of the averages."
    if "steps" not in schedule:
        return text
    advised, cycles = schedule["recommended_layers_per_slot"], schedule["recommended_for_cycles"]
    wanted = "one full cycle" if cycles == 1 else f"{cycles} full cycles"
    advice = "shorten the period" if advised is None else f"for {wanted} use layers_per_slot: {advised}"
    return f"{text} A run of {schedule['steps']:,} steps makes {schedule['cycles']:.2f} cycles; {advice}."
