"""Ranks that share each sequence (DeepSpeed's Ulysses) beside ranks with sequences of their own: bytes kept, bytes sent, time,
and the longest sequence that trains within a limit of memory; what tiles, recomputation and offload save.

    python -m benchmarks.long_context kept [--length 512]        # what backward waits for, and what attention sends
    python -m benchmarks.long_context time [--length 512]        # a step beside sp = 1, at equal tokens
    python -m benchmarks.long_context longest [--limit 2.0]      # GB of a process
    python -m benchmarks.long_context forms [--length 4096]      # peak of a step, alone: tiled MLPs, recomputed layers, offload

kept: storages that autograd saves in a forward pass, each once, without parameters; "host": made by offloading hooks.
sent: heads for tokens, there and back, in a forward and backward pass, counted at the collectives. longest: the peak of the
process, imports and weights included; a try is a whole optimizer step, and lengths grow by --growth, from sp times --length,
until one does not fit. forms: the peak of a step above what the process had before it, each form in a process of its own; on a
CPU what is offloaded stays in the same memory, so that for it the bytes kept on either side are what is to be read.

With --json results are added to those that stand in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import logging
import resource
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import header, on_ranks, read_results, table, write_json
from benchmarks.kept import KeptStorages
from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.timing import median_interval
from losia_dist import LoSiAConfig, get_losia_model, initialize, split_sequence, use_chunked_loss
from losia_dist.integrations.deepspeed.tiled_mlp import use_tiled_mlp
from losia_dist.loss.sequence_loss import sum_over_sequence
from losia_dist.recipe import offloaded

CHECKPOINTING = ("off", "recomputed", "offloaded")


class Exchanged(TorchDispatchMode):
    """Bytes a rank sends for attention: all but its own part of what it puts into an all-to-all."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.sent = ranks, defaultdict(int)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if "alltoall" in name or "all_to_all" in name:  # DeepSpeed has an operator of its own around torch's
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.sent["heads for tokens"] += tensors[0].nbytes * (self.ranks - 1) // self.ranks
        return function(*args, **(kwargs or {}))


def start(size: int, options: argparse.Namespace) -> Any:
    """An engine whose ranks share sequences, `size` each."""
    import deepspeed

    warnings.simplefilter("ignore")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    torch.manual_seed(0)
    sizes = {name: getattr(options, name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=1 << 20,
        attn_implementation="sdpa",
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # So that a step has as many tokens whatever the size.
        "gradient_accumulation_steps": size if options.what == "time" else 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.stage, "stage3_param_persistence_threshold": 0},
        "sequence_parallel_size": size,
    }
    model = LlamaForCausalLM(config).train()
    if options.checkpointing != "off":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.checkpointing == "offloaded":
        offloaded.offload_checkpoints(model)
    losia = LoSiAConfig(rank_factor=0.125, period=1000)
    model = get_losia_model(model, losia)
    if options.tiles > 1:
        use_tiled_mlp(model, options.tiles)
    if options.loss == "chunked":
        use_chunked_loss(model, options.loss_chunk)
    engine, *_ = initialize(model=model, losia_config=losia, config=settings, lr=1e-4, watch=False)
    return engine


def part_of(length: int, place: int, size: int, vocabulary: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(place))
    return split_sequence({"input_ids": tokens, "labels": tokens}, rank=dist.get_rank() % size, size=size)


def loss_of(engine: Any, part: dict[str, torch.Tensor], length: int) -> torch.Tensor:
    loss = engine(**part, use_cache=False, num_items_in_batch=length - 1).loss
    return sum_over_sequence(loss, engine.losia.sequence.group)


def step(engine: Any, length: int, options: argparse.Namespace) -> None:
    """As many sequences as ranks, whatever the size of their groups."""
    size = engine.losia.sequence.size
    for place in range(size):
        part = part_of(length, place * 1000 + dist.get_rank() // size, size, options.vocab_size)
        engine.backward(loss_of(engine, part, length))
        engine.step()


def end(engine: Any) -> None:
    engine.losia.detach()
    engine.destroy()


def kept(size: int, options: argparse.Namespace) -> dict[str, int]:
    """Runs on every rank: bytes of one forward pass that wait for backward, and bytes sent by attention there and back."""
    engine = start(size, options)
    part = part_of(options.length, 0, size, options.vocab_size)
    with Exchanged(size) as exchanged:
        with waiting(engine.module) as found:
            loss = loss_of(engine, part, options.length)
        engine.backward(loss)
    end(engine)
    return {**found, "sent": sum(exchanged.sent.values())}


@contextlib.contextmanager
def waiting(model: Any) -> Iterator[dict[str, int]]:
    """Filled at the end: bytes that autograd saved in here where the model is ("kept"), and on the host by offloading."""
    storages = KeptStorages(model.parameters())
    found = {"kept": 0, "host": 0}
    to_host = offloaded._pack

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages.add(tensor)
        return tensor

    def pack_on_host(tensor: torch.Tensor) -> Any:
        packed = to_host(tensor)
        if isinstance(packed, torch.Tensor):
            return pack(packed)
        found["host"] += packed[1].nbytes
        return packed

    offloaded._pack = pack_on_host
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        offloaded._pack = to_host
    found["kept"] = storages.nbytes


def form(options: argparse.Namespace) -> dict[str, int]:
    """Runs on one rank: the peak of a step above what was there before, and bytes that wait for backward."""
    engine = start(1, options)
    short, part = (part_of(length, 0, 1, options.vocab_size) for length in (64, options.length))
    engine.backward(loss_of(engine, short, 64))  # what is made once, and the optimizer's state
    engine.step()
    gc.collect()
    reset_peak("cpu")
    before = peak_bytes("cpu")
    engine.backward(loss_of(engine, part, options.length))
    engine.step()
    found = {"peak": peak_bytes("cpu") - before, "before": before}
    with waiting(engine.module) as bytes_kept:
        loss = loss_of(engine, part, options.length)
    engine.backward(loss)
    end(engine)
    return {**found, **bytes_kept}


def seconds(sizes: list[int], options: argparse.Namespace) -> dict[int, list[float]]:
    """Runs on every rank: seconds of a step for each size, in turn, so that a busy machine shows in all of them."""
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(options.rounds):
        for size in sizes:
            engine = start(size, options)
            step(engine, options.length, options)
            for _ in range(options.steps):
                dist.barrier()
                began = time.perf_counter()
                step(engine, options.length, options)
                dist.barrier()
                found[size].append(time.perf_counter() - began)
            end(engine)
    return found


def longest(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs on every rank of one group: the last length of a step within the limit, on all of them."""
    engine = start(size, options)
    limit, length, fits, at, before = options.limit * 1e9, size * options.length, 0, 0.0, peak()
    tries: list[tuple[int, float]] = []
    while True:
        length -= length % size
        part = part_of(length, 0, size, options.vocab_size)
        engine.backward(loss_of(engine, part, length))
        engine.step()
        reached = torch.tensor([peak()], dtype=torch.float64)
        dist.all_reduce(reached, dist.ReduceOp.MAX)
        tries.append((length, reached.item()))
        if reached.item() > limit:
            break
        fits, at = length, reached.item()
        length = int(length * options.growth)
    end(engine)
    return {"length": fits, "peak": at, "before": before, "tries": tries}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kept", "time", "longest", "forms"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    for name, value in (("hidden_size", 512), ("intermediate_size", 1408), ("vocab_size", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="off")
    parser.add_argument("--tiles", type=int, default=1, help="parts that MLPs compute a micro-batch in (1; forms: 8)")
    parser.add_argument("--loss", choices=("plain", "chunked"), default="plain", help="forms: chunked")
    parser.add_argument("--loss_chunk", type=int, default=512, help="tokens")
    parser.add_argument("--limit", type=float, default=2.0, help="with longest: GB of a process (2.0)")
    parser.add_argument("--growth", type=float, default=1.25, help="with longest: a length beside the one before (1.25)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", help="file for the numbers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = options_of(arguments)
    stored = read_results(options.json) if options.json else []
    print(header())
    print(f"Llama, {options.layers} layers, hidden {options.hidden_size}, fp32, ZeRO-{options.stage}, p = 1/8")
    found, columns, rows = {"kept": run_kept, "time": run_time, "longest": run_longest, "forms": run_forms}[options.what](
        options
    )
    print(table(columns, rows))
    entry = {
        "what": options.what,
        "options": {n: v for n, v in vars(options).items() if n not in ("what", "json")},
        "found": found,
    }
    write_json(options.json, [*stored, entry])
    return found


Found = tuple[dict[str, Any], list[str], list[list[Any]]]  # numbers, and a table of them


def run_kept(options: argparse.Namespace) -> Found:
    found = {str(size): on_ranks(size, kept, size, options) for size in options.sizes}
    rows = [[size, *(f"{one[name] / 1e6:.2f}" for name in ("kept", "host", "sent"))] for size, one in found.items()]
    return (
        found,
        ["sp", f"kept of a sequence of {options.length}, MB a rank", "on the host", "sent for attention, MB a rank"],
        rows,
    )


def run_time(options: argparse.Namespace) -> Found:
    most = max(options.sizes)
    times = on_ranks(most, seconds, options.sizes, options)
    base = times[options.sizes[0]]
    ratios = {size: [a / b for a, b in zip(own, base, strict=True)] for size, own in times.items()}
    found = {str(size): {"seconds": times[size], "ratios": ratios[size]} for size in times}
    rows = []
    for size in times:
        low, high = median_interval(ratios[size])
        rows.append(
            [size, f"{statistics.median(times[size]):.2f}", f"{statistics.median(ratios[size]):.2f}", f"{low:.2f}-{high:.2f}"]
        )
    return found, ["sp", f"s a step, {most} sequences of {options.length}", "beside the first", "95 %"], rows


def run_longest(options: argparse.Namespace) -> Found:
    found = {str(size): on_ranks(size, longest, size, options) for size in options.sizes}
    rows = [
        [size, f"{one['length']:,}", f"{one['peak'] / 1e9:.2f}", f"{one['before'] / 1e9:.2f}"] for size, one in found.items()
    ]
    return found, ["sp", f"longest within {options.limit:g} GB a rank", "its peak, GB", "before the first step, GB"], rows


def run_forms(options: argparse.Namespace) -> Found:
    options.loss, tiles = "chunked", options.tiles if options.tiles > 1 else 8
    found, rows = {}, []
    for options.checkpointing in CHECKPOINTING:
        for options.tiles in (1, tiles):
            name = options.checkpointing + (f", MLPs in {tiles} tiles" if options.tiles > 1 else "")
            found[name] = one = on_ranks(1, form, copy.copy(options))
            rows.append([name, *(f"{one[key] / 1e6:.1f}" for key in ("peak", "kept", "host"))])
            print(rows[-1], flush=True)
    return found, [f"layers, {options.length} tokens", "peak of a step, MB", "kept for backward, MB", "on the host, MB"], rows


if __name__ == "__main__":
    main()
