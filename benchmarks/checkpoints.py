"""Sizes and times of checkpoints, and the memory of exports, measured for a model on this machine and computed for 70B.

    python -m benchmarks.checkpoints [--layers 30 --hidden 576 ...] [--steps 4] [--json FILE]

The measured model has SmolLM2-135M's shape and random bf16 weights. A subnet is moved on at every step, so that the journal
shows its price.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import header, table, write_json
from losia_dist import (
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    export_model,
    get_losia_model,
    load_checkpoint,
    losia_parameter_groups,
    save_checkpoint,
)
from losia_dist.export.delta import apply_delta, save_delta
from losia_dist.formulas import (
    full_checkpoint_bytes,
    importance_checkpoint_bytes,
    journal_bytes,
    step_checkpoint_bytes,
    subnet_size,
)

LLAMA_70B = {"layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8, "vocab": 32000, "tied": False}
_EXPORT_ALONE = """
import sys
from benchmarks.checkpoints import peak_of
from losia_dist.export.offline import export_checkpoint
print(peak_of(lambda: export_checkpoint(sys.argv[1], sys.argv[2])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152}
    for name, default in shape.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rank-factor", type=float, default=0.125)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json")
    options = parser.parse_args()
    found = {name: getattr(options, name) for name in shape} | {"tied": True}
    print(header())
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(found, options.rank_factor, options.steps, Path(directory))
    print(table(["measured", "value"], list(measured.items())))
    computed = {
        f"{name}, p = 1/{round(1 / factor)}": sizes(given, factor)
        for name, given in (("measured model", found), ("70B", LLAMA_70B))
        for factor in (options.rank_factor,)
    }
    print(
        table(
            ["computed (bytes)", *computed], [[row, *(f"{c[row]:,}" for c in computed.values())] for row in sizes(found, 0.5)]
        )
    )
    write_json(options.json, {"measured": measured, "computed": computed})


def sizes(shape: dict[str, Any], factor: float, bytes_of_weight: int = 2) -> dict[str, int]:
    """Bytes of a run's files: bf16 weights; fp32 master and two moments, int64 indices of every subnet."""
    hidden, inner = shape["hidden"], shape["intermediate"]
    keys = hidden // shape["heads"] * shape["kv_heads"]
    linears = [
        (hidden, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, hidden),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]
    subnets = [(subnet_size(m, factor), subnet_size(n, factor)) for m, n in linears]
    elements, indices = sum(r * c for r, c in subnets), sum(r + c for r, c in subnets)
    whole = shape["layers"] * (sum(m * n for m, n in linears) + 2 * hidden) + hidden
    whole += shape["vocab"] * hidden * (1 if shape["tied"] else 2)
    largest = max(m * n for m, n in linears)
    return {
        "base, once": whole * bytes_of_weight,
        "step: masters, moments, indices": step_checkpoint_bytes(shape["layers"] * elements, shape["layers"] * indices),
        "step: importance of one layer in progress": importance_checkpoint_bytes(sum(m * n for m, n in linears)),
        "journal, per layer that moved": journal_bytes(elements, indices, bytes_of_weight),
        "full fine-tuning's checkpoint (weights, masters, moments)": full_checkpoint_bytes(whole, bytes_of_weight),
        "export's memory (largest weight)": max(largest, shape["vocab"] * hidden) * bytes_of_weight,
    }


def measure(shape: dict[str, Any], factor: float, steps: int, directory: Path) -> dict[str, str]:
    """Save, load, export and delta of one process; times include the sync to the disk."""
    found = measure_saving(shape, factor, steps, directory)
    gc.collect()
    run = directory / "run"
    found["export"] = seconds(lambda: found.update(peak=export_peak(run, directory / "exported")))
    found["export: peak of anonymous memory"] = found.pop("peak")
    found["exported model"] = size(directory / "exported")
    found["delta: write"] = seconds(lambda: save_delta(run, directory / "run.delta", directory / "model"))
    found["delta"] = size(directory / "run.delta")
    found["delta: apply"] = seconds(lambda: apply_delta(directory / "run.delta", directory / "model", directory / "rebuilt"))
    same = (directory / "rebuilt/model.safetensors").read_bytes() == (directory / "exported/model.safetensors").read_bytes()
    found["rebuilt = exported, bit for bit"] = "yes" if same else "NO"
    return found


def measure_saving(shape: dict[str, Any], factor: float, steps: int, directory: Path) -> dict[str, str]:
    """Train a few steps in this process, saving into directory/run; the base model goes to directory/model."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(settings).to(torch.bfloat16)
    model.save_pretrained(directory / "model")
    config = LoSiAConfig(rank_factor=factor, period=1)
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    arguments = {"model": model, "optimizer": optimizer, "losia": losia}
    run = directory / "run"
    tokens = torch.randint(0, shape["vocab"], (1, 16))
    found: dict[str, str] = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()

    step()
    found["first save (base and state)"] = seconds(lambda: save_checkpoint(run, **arguments))
    for _ in range(steps):
        step()
    found[f"save, {steps} layers moved"] = seconds(lambda: save_checkpoint(run, **arguments))
    found["save, asynchronous: returns after"] = seconds(lambda: save_checkpoint(run, **arguments, step=99, asynchronous=True))
    found["load (checksums and all)"] = seconds(lambda: load_checkpoint(run, **arguments))
    export_model(losia, directory / "warm")  # what the first call imports is not the export's
    live = lambda: found.update(live=f"{peak_of(lambda: export_model(losia, directory / 'live')):,} bytes")  # noqa: E731
    found["export of the live model"] = seconds(live)
    found["export of the live model: peak of anonymous memory"] = found.pop("live")
    found["largest weight"] = f"{max(p.numel() * p.element_size() for p in model.parameters()):,} bytes"
    step_directory = run / f"step-{losia.steps:08d}"
    found["base"] = size(run / "base")
    found["step"] = size(step_directory)
    found[f"journal of {steps} layers"] = size(run / "journal")
    return found


def export_peak(run: Path, directory: Path) -> str:
    """Export in a process of its own, and how much memory it took beyond what it began with."""
    command = [sys.executable, "-c", _EXPORT_ALONE, str(run), str(directory)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return f"{int(printed.split()[-1]):,} bytes"


def peak_of(action: Callable[[], Any]) -> int:
    """Most bytes of anonymous memory during an action beyond those before it; what is mapped from files is the page cache's."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    start, peak, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], held())

    thread = threading.Thread(target=watch)
    thread.start()
    action()
    done.set()
    thread.join()
    return max(0, peak[0] - start)


def seconds(action: Callable[[], Any]) -> str:
    """Wall time of an action."""
    began = time.perf_counter()
    action()
    return f"{time.perf_counter() - began:.2f} s"


def size(path: Path) -> str:
    """Bytes of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files):,} bytes"


if __name__ == "__main__":
    main()
