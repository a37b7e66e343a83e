"""Ranks that share each sequence (DeepSpeed's Ulysses) beside ranks with sequences of their own: bytes kept, bytes sent, time,
and the longest sequence that trains within a limit of memory.

    python -m benchmarks.long_context kept [--length 512]        # what backward waits for, and what attention sends
    python -m benchmarks.long_context time [--length 512]        # a step beside sp = 1, at equal tokens
    python -m benchmarks.long_context longest [--limit 2.0]      # GB of a process

kept: storages that autograd saves in a forward pass, each once, without parameters. sent: heads for tokens, there and back, in
a forward and backward pass, counted at the collectives. longest: the peak of the process, imports and weights included; a try
is a whole optimizer step, and lengths grow by a quarter, from sp times --length, until one does not fit.
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import header, on_ranks, table, write_json
from losia_dist import LoSiAConfig, initialize, split_sequence
from losia_dist.loss.sequence_loss import sum_over_sequence

GROWTH = 1.25


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
        "gradient_accumulation_steps": size,  # so that a step has as many tokens whatever the size
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.stage, "stage3_param_persistence_threshold": 0},
        "sequence_parallel_size": size,
    }
    model = LlamaForCausalLM(config).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losia = LoSiAConfig(rank_factor=0.125, period=1000)
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
    own = {parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = part_of(options.length, 0, size, options.vocab_size)
    with Exchanged(size) as exchanged:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(engine, part, options.length)
        engine.backward(loss)
    end(engine)
    return {"kept": sum(storages.values()), "sent": sum(exchanged.sent.values())}


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


def longest(size: int, options: argparse.Namespace) -> dict[str, float]:
    """Runs on every rank of one group: the last length of a step within the limit, on all of them."""
    engine = start(size, options)
    limit, length, fits, at, before = options.limit * 1e9, size * options.length, 0, 0.0, peak()
    while True:
        length -= length % size
        part = part_of(length, 0, size, options.vocab_size)
        for _ in range(size):
            engine.backward(loss_of(engine, part, length))
            engine.step()
        reached = torch.tensor([peak()], dtype=torch.float64)
        dist.all_reduce(reached, dist.ReduceOp.MAX)
        if reached.item() > limit:
            break
        fits, at = length, reached.item()
        length = int(length * GROWTH)
    end(engine)
    return {"length": fits, "peak": at, "before": before}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kept", "time", "longest"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    for name, value in (("hidden_size", 512), ("intermediate_size", 1408), ("vocab_size", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--limit", type=float, default=2.0, help="with longest: GB of a process (2.0)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args(arguments)
    print(header())
    print(f"Llama, {options.layers} layers, hidden {options.hidden_size}, fp32, ZeRO-{options.stage}, p = 1/8")
    most = max(options.sizes)
    found: dict[str, Any] = {}
    if options.what == "kept":
        found = {str(size): on_ranks(size, kept, size, options) for size in options.sizes}
        rows = [[size, f"{one['kept'] / 1e6:.2f}", f"{one['sent'] / 1e6:.2f}"] for size, one in found.items()]
        print(table(["sp", f"kept of a sequence of {options.length}, MB a rank", "sent for attention, MB a rank"], rows))
    elif options.what == "time":
        times = on_ranks(most, seconds, options.sizes, options)
        base = times[options.sizes[0]]
        ratios = {size: [a / b for a, b in zip(own, base, strict=True)] for size, own in times.items()}
        found = {str(size): {"seconds": times[size], "ratios": ratios[size]} for size in times}
        rows = [[str(s), f"{statistics.median(times[s]):.2f}", f"{statistics.median(ratios[s]):.2f}"] for s in times]
        print(table(["sp", f"s a step, {most} sequences of {options.length}", "beside the first"], rows))
    else:
        found = {str(size): on_ranks(size, longest, size, options) for size in options.sizes}
        rows = [
            [size, f"{one['length']:,}", f"{one['peak'] / 1e9:.2f}", f"{one['before'] / 1e9:.2f}"]
            for size, one in found.items()
        ]
        print(table(["sp", f"longest within {options.limit:g} GB a rank", "its peak, GB", "before the first step, GB"], rows))
    write_json(options.json, found)
    return found


if __name__ == "__main__":
    main()
