"""Start-up of a run: how long it takes to load a model into an engine's shards, and how much host memory all ranks need.

    python -m benchmarks.loading [--engines zero3 fsdp2] [--precisions bf16 fp32] [--ranks 4] [--layers 20 ...] [--json FILE]

A random Llama of about 1.0 B parameters is written in bf16 (2.0 GB) and loaded by the training script's own code, up to an
engine that is ready to train, twice: as it is, and with every weight read whole first (ZeRO-3: by every rank; FSDP2: by rank
0, which sends it). Each run has fresh processes. "loaded" is when engine and optimizer are made, and all that remains is the
conductor (importance of the first layers, optimizer state); "ready" is when that is made too. Memory is counted above what a
process held when all was imported and the process group stood, at its peak, sampled every 2 ms from /proc/self/status, and the
ranks' peaks are added up whether or not they fell together. "own" is RssAnon and RssShmem. "resident" is VmRSS, in which
pages that are mapped from files count too, the checkpoint's and the code's, once for each process that touched them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import RESULTS, bar, bar_table, header, on_ranks, table, write_json
from losia_dist import LoSiA, LoSiAConfig, get_losia_model
from losia_dist.errors import ConfigError
from losia_dist.ranks.agreement import Agreement
from losia_dist.recipe import load_inputs, script
from losia_dist.recipe.choice import choose_engine
from losia_dist.recipe.environment import find_process
from losia_dist.recipe.options import add_training_arguments
from losia_dist.recipe.weights.model_files import ReadWhole

LIMIT = 1.3  # times the model's bytes, over all ranks together
PERIOD = 0.002  # seconds between samples
ENGINES = ("zero3", "fsdp2")
KINDS = ("loaded, own", "loaded, resident", "ready, own", "ready, resident")
_ZERO3 = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1_000_000}}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16"])
    parser.add_argument("--ranks", type=int, default=4)
    for name, default in {"layers": 20, "hidden": 2048, "intermediate": 5632, "vocab": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", default=str(RESULTS / "loading.json"))
    options = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        parameters = write_model(Path(directory), options.layers, options.hidden, options.intermediate, options.vocab)
        print(header())
        for precision in options.precisions:
            size = parameters * (2 if precision == "bf16" else 4)
            print(
                f"\n{parameters:,} parameters, bf16 on disk, {precision} in memory: {size / 1e9:.2f} GB; {options.ranks} ranks"
            )
            for engine in options.engines:
                for whole in (True, False):
                    ranks = on_ranks(options.ranks, all_ranks, directory, engine, precision, whole)
                    found = {kind: sum(rank[kind] for rank in ranks) / size for kind in KINDS}
                    results.append(
                        {
                            "engine": engine,
                            "precision": precision,
                            "weights": "read whole first" if whole else "read in parts",
                            "seconds": max(rank["seconds"] for rank in ranks),
                            **found,
                            "largest rank": max(rank["loaded, own"] for rank in ranks) / size,
                        }
                    )
    print(f"\npeaks above the idle processes, in multiples of the model's bytes\n{as_table(results)}")
    bars = [
        bar(f"{entry['engine']}, {entry['precision']}: host memory of all ranks / model", entry["loaded, resident"], LIMIT)
        for entry in results
        if entry["weights"] == "read in parts"
    ]
    print(f"\n{bar_table(bars)}")
    write_json(options.json, {"runs": results, "bars": bars})
    return results


def as_table(results: list[dict[str, Any]]) -> str:
    columns = ["engine", "in memory", "weights", "start-up", *KINDS, "largest rank"]
    rows = [
        [
            entry["engine"],
            entry["precision"],
            entry["weights"],
            f"{entry['seconds']:.1f} s",
            *(f"{entry[kind]:.2f}" for kind in (*KINDS, "largest rank")),
        ]
        for entry in results
    ]
    return table(columns, rows)


def write_model(directory: Path, layers: int, hidden: int, intermediate: int, vocabulary: int) -> int:
    """A random bf16 Llama in several files; returns its number of parameters."""
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=vocabulary,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(directory, max_shard_size="500MB")
    return model.num_parameters()


def all_ranks(directory: str, engine: str, precision: str, whole: bool) -> list[dict[str, float]]:
    """`start` on every rank; everyone's findings, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, start(directory, engine, precision, whole))
    return everyone


def start(directory: str, engine: str, precision: str, whole: bool = False) -> dict[str, float]:
    """Load a model into an engine as the training script does. Called by all ranks.

    Args:
        whole: with every weight read whole first, as where the files cannot be read in parts.

    Returns:
        "seconds" until it is ready, and this rank's peaks above its start in bytes by KINDS.
    """
    disable_progress_bar()
    warm_up(engine)
    process = find_process()
    words = ["--model", directory, "--train_file", "-", "--output_dir", "-", "--losia", "--precision", precision]
    if engine != "zero3":
        words += ["--sharding", engine]
    options = add_training_arguments(argparse.ArgumentParser()).parse_args([*words, "--max_steps", "1"])
    settings = dict(_ZERO3) if engine == "zero3" else None
    options.deepspeed = settings
    options.learning_rate = 5e-5  # nothing is trained
    choice = choose_engine(options, process)
    config = LoSiAConfig()
    agreement = Agreement(dist.new_group(backend="gloo"), is_own=True)
    unreadable = mock.patch.object(load_inputs, "find_weights", side_effect=ReadWhole("is to be read whole"))
    dist.barrier()
    conductor = LoSiA.__init__

    def loaded(*arguments: Any, **options: Any) -> None:
        for kind in ("own", "resident"):
            peaks[f"loaded, {kind}"] = peaks[kind]
        conductor(*arguments, **options)

    with (
        watch_memory() as peaks,
        unreadable if whole else contextlib.nullcontext(),
        mock.patch.object(LoSiA, "__init__", loaded),
    ):
        began = time.perf_counter()
        model, weights, _ = load_inputs.load_model(options, choice, process)
        if (weights is None) != whole:
            raise ConfigError("the weights were not read as they were to be")
        get_losia_model(model, config)
        ready = script._start(model, config, choice, options, process, 1, weights, agreement)
        seconds = time.perf_counter() - began
    assert ready.losia is not None
    ready.losia.detach()
    ready_peaks = {f"ready, {kind}": peaks.pop(kind) for kind in ("own", "resident")}
    return {"seconds": seconds, **peaks, **ready_peaks}


def warm_up(engine: str) -> None:
    """Import what loading needs, and let a small transfer run: idle processes have done so too."""
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    if engine == "zero3":
        import deepspeed

        deepspeed.init_distributed()
    dist.all_reduce(torch.zeros(1))
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: memory that was freed before would be taken again unseen
        trim(0)


@contextmanager
def watch_memory() -> Iterator[dict[str, float]]:
    """Gives a dictionary of this process's peaks so far, in bytes above those at the start, and keeps it until the end."""
    before, done = held(), threading.Event()
    peaks = dict.fromkeys(before, 0.0)

    def watch() -> None:
        while not done.wait(PERIOD):
            for kind, value in held().items():
                peaks[kind] = max(peaks[kind], float(value - before[kind]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def held() -> dict[str, int]:
    """Bytes of memory of this process: its own, and all that is resident."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    sizes = {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmRSS")}
    return {"own": sizes["RssAnon"] + sizes["RssShmem"], "resident": sizes["VmRSS"]}


if __name__ == "__main__":
    main()
