"""`losia-dist plan`: what a run takes on a cluster, before it is rented. One process, no GPU; nothing is downloaded but a
configuration, where --model names a model on the hub.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.digits import short
from losia_dist.errors import ConfigError
from losia_dist.tools.plan.workload import ENGINES, GB, GPUS, METHODS, OFFLOADS, QUANTIZATIONS, Cluster, Workload


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist plan`; units and defaults are in the help texts."""
    parser.add_argument("--model", required=True, help="built-in shape (llama-2-70b, qwen3-30b-a3b ...), directory, hub name")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=int, default=1, help="machines (1)")
    cluster.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (8)")
    cluster.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU, 10^9 bytes (80)")
    cluster.add_argument("--gpu", default="h100", help=f"for the rates: {', '.join(GPUS)} (h100)")
    cluster.add_argument("--node-bandwidth", type=float, default=50.0, metavar="GB/s", help="between nodes, for each GPU (50)")
    cluster.add_argument("--efficiency", type=float, default=0.4, help="share of the peak rate that is reached (0.4)")
    cluster.add_argument("--link-efficiency", type=float, default=0.7, help="share of the links' rates that is reached (0.7)")
    cluster.add_argument("--reserve", type=float, default=4.0, metavar="GB", help="for driver, NCCL and fragments (4)")
    run = parser.add_argument_group("run")
    run.add_argument("--engine", help=f"{', '.join(ENGINES)} (default: the fastest that fits)")
    run.add_argument("--shard-ranks", type=int, help="with hsdp: ranks that share one copy of the model (a node's GPUs)")
    run.add_argument("--offload", default="none", help=f"to host memory: {', '.join(OFFLOADS)} (none)")
    run.add_argument("--method", default="losia", help=f"{', '.join(METHODS)} (losia)")
    run.add_argument("--quantization", help=f"of the frozen weights: {', '.join(QUANTIZATIONS)} (bf16)")
    run.add_argument("--sequence-length", type=int, help="tokens of a row (2048, or the model's own limit below it)")
    run.add_argument("--micro-batch", type=int, default=1, help="rows of one GPU's forward pass (1)")
    run.add_argument("--gradient-accumulation", type=int, default=1, help="forward passes per optimizer step (1)")
    run.add_argument("--checkpointing", choices=("on", "off"), help="recompute activations in backward (on)")
    run.add_argument(
        "--sequence-parallel", type=int, default=1, metavar="N", help="GPUs that compute each sequence together (1)"
    )
    run.add_argument("--activation-offload", action="store_true", help="activations wait for backward in host memory (off)")
    run.add_argument(
        "--loss", choices=("plain", "chunked"), default="plain", help="chunked: few tokens' logits at a time (plain)"
    )
    run.add_argument("--steps", type=int, help="optimizer steps of the run: for the schedule and its advice")
    losia = parser.add_argument_group("methods")
    losia.add_argument("--losia_config", metavar="FILE", help="LoSiA's settings; the options below override it")
    losia.add_argument("--rank-factor", type=float, nargs="+", metavar="P", help="one share, or rows and columns (0.125)")
    losia.add_argument("--output-rank-factor", type=float, help="share of the output layer's rows (frozen)")
    losia.add_argument("--selection", help="greedy (located) or random (drawn); mixtures of experts: random, others: greedy")
    losia.add_argument("--period", type=int, help="optimizer steps of a time slot (100)")
    losia.add_argument("--layers-per-slot", type=int, help="decoder layers that localize in a slot (1)")
    losia.add_argument("--lora-rank", type=int, help="with --method lora (64, or the model's smallest side)")
    output = parser.add_argument_group("output")
    output.add_argument("--simulate", action="store_true", help="measure the peak on fake tensors as well (fsdp2, hsdp)")
    output.add_argument("--compare", action="store_true", help="full fine-tuning and LoRA beside it, on the same cluster")
    output.add_argument("--json", action="store_true", help="one JSON record instead of tables")
    output.add_argument("--output", metavar="DIRECTORY", help="write a run file, the engine's and the launch command")


def run_plan(options: argparse.Namespace) -> int:
    """Plan, print, write; returns the exit code 0, whether or not the run fits (`fits` says that).

    Raises:
        LoSiAError: an unknown model, an impossible cluster, a value out of range, or a file that cannot be written.
    """
    from losia_dist.tools.plan.launch_files import write_launch
    from losia_dist.tools.plan.tables import describe
    from losia_dist.tools.plan.workload_plan import make_plan, recommend

    if options.steps is not None and options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: at least 1 is needed.")
    workload = _workload(options)
    advised = recommend(workload)
    if options.engine is None and advised is not None:
        # The recommended run, if it keeps what was asked for by name.
        keeps = options.checkpointing in (None, "on" if advised.workload.checkpointing else "off")
        workload = advised.workload if keeps and options.offload in ("none", advised.workload.offload) else workload
    methods = [options.method, *(m for m in METHODS if options.compare and m != options.method)]
    workloads = [
        replace(workload, method=one, quantization=workload.quantization if one != "full" else None) for one in methods
    ]
    plans = [make_plan(one, _simulated_peak(one) if options.simulate else None) for one in workloads]
    record: dict[str, Any] = plans[0].record(options.steps)
    record["recommended"] = None if advised is None else _choice(advised)
    if options.compare:
        record["compared"] = {p.workload.method: p.record(options.steps) for p in plans[1:]}
    to_write, said = _advised(plans[0].workload, record.get("schedule", {}), options)
    written = write_launch(to_write, Path(options.output)) if options.output else []
    if options.json:
        print(json.dumps(record | {"written": [str(path) for path in written]}, indent=2))
        return 0
    print(describe(plans, options.steps))
    print(f"\n{_advice(plans[0], advised)}")
    if written and said:
        print(said)
    for path in written:
        print(f"written: {path}")
    return 0


def advised_workload(options: argparse.Namespace) -> Any:
    """The plan that is recommended for these options. Raises: ConfigError where nothing fits."""
    from losia_dist.tools.plan.workload_plan import recommend

    advised = recommend(_workload(options))
    if advised is None:
        raise ConfigError(_advice(None, None))
    return advised


def _advised(workload: Workload, schedule: dict[str, Any], options: argparse.Namespace) -> tuple[Workload, str]:
    """The workload with as many layers a slot as its schedule advises, where nobody asked for a number; and what is said."""
    from losia_dist.tools.plan.workload_plan import make_plan

    count = schedule.get("recommended_layers_per_slot")
    is_asked = options.layers_per_slot is not None or options.losia_config is not None
    if count is None or is_asked or count <= workload.layers_per_slot:
        return workload, ""
    other = replace(workload, config=replace(workload.config, layers_per_slot=count))
    plan = make_plan(other)
    takes = f"layers_per_slot: {count}, as advised for {options.steps:,} steps: {short(plan.memory.total / GB)} GB"
    if not plan.fits:
        return workload, f"Not written: {takes}, which does not fit. --layers-per-slot, or a shorter --period, decides."
    return other, f"Written with {takes}."


def _simulated_peak(workload: Workload) -> int:
    from losia_dist.tools.plan.simulation import simulate

    if sys.stderr.isatty():
        print(f"simulating {workload.shape.layers} layers, {workload.method} ...", file=sys.stderr)
    return simulate(workload)


def _workload(options: argparse.Namespace) -> Workload:
    from losia_dist.localization.schedule import resolve_layers_per_slot
    from losia_dist.tools.plan.shapes import find_shape

    shape = find_shape(options.model)
    cluster = Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        memory=_bytes("--gpu-memory", options.gpu_memory),
        gpu=options.gpu,
        node_bandwidth=options.node_bandwidth * GB,
        compute_efficiency=options.efficiency,
        link_efficiency=options.link_efficiency,
        reserve=_bytes("--reserve", options.reserve),
    )
    config = _config(options, shape.has_experts)
    fits_run = config.layers_per_slot == "auto" and options.steps is not None
    workload = Workload(
        shape,
        cluster,
        engine=options.engine or ("zero3" if options.sequence_parallel > 1 else "fsdp2" if cluster.gpus > 1 else "ddp"),
        method=options.method,
        sequence=min(2048, shape.context) if options.sequence_length is None else options.sequence_length,
        micro_batch=options.micro_batch,
        accumulation=options.gradient_accumulation,
        checkpointing=options.checkpointing != "off",
        offload=options.offload,
        shard_ranks=options.shard_ranks,
        config=replace(config, layers_per_slot=1) if fits_run else config,
        quantization=options.quantization,
        lora_rank=min(64, shape.narrowest) if options.lora_rank is None else options.lora_rank,
        sequence_ranks=options.sequence_parallel,
        activation_offload=options.activation_offload,
        chunked_loss=options.loss == "chunked",
    )
    if not fits_run:
        return workload
    return replace(workload, config=resolve_layers_per_slot(config, options.steps, workload.groups, workload.data_ranks))


def _config(options: argparse.Namespace, has_experts: bool) -> LoSiAConfig:
    values = LoSiAConfig.read(options.losia_config).to_dict() if options.losia_config else {}
    if has_experts and not options.losia_config:
        values["selection"] = "random"  # docs/experts.md: begin with drawn subnets
    names = ("rank_factor", "output_rank_factor", "selection", "period", "layers_per_slot")
    given = {name: getattr(options, name) for name in names}
    values |= {name: value for name, value in given.items() if value is not None}
    if options.rank_factor is not None and len(options.rank_factor) == 1:
        (values["rank_factor"],) = options.rank_factor
    return LoSiAConfig.from_dict(values)


def _bytes(option: str, value: float) -> int:
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{option} {value}: GB, at least 0.")
    return int(value * GB)


def _choice(plan: Any) -> dict[str, Any]:
    chosen = {name: getattr(plan.workload, name) for name in ("engine", "checkpointing", "offload")}
    return {**chosen, "peak_bytes_per_gpu": plan.peak, "seconds_per_step": plan.seconds}


def _advice(plan: Any, advised: Any) -> str:
    if advised is None:
        return (
            "Nothing fits: no engine, with checkpointing and offload. More GPUs, a smaller --micro-batch or --sequence-length, "
            "or another --method may."
        )
    chosen = advised.workload
    return (
        f"Recommended: {'this, ' if plan.workload == chosen else ''}{chosen.engine}, checkpointing "
        f"{'on' if chosen.checkpointing else 'off'}, offload {chosen.offload}: {short(advised.memory.total / GB)} GB and "
        f"{short(advised.seconds)} s a step."
    )
