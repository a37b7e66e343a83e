"""python -m benchmarks.quantized_step: a step over a base in NF4 beside QLoRA's: time, bytes kept for backward, peak memory.

A Llama of 8 layers with random weights. The floor: bitsandbytes' own frozen layers, forward and dx. Subnets have been drawn
anew once in every layer before anything is measured, so that each layer has an overlay of a full cycle. All methods of a run
live in one process and take turns; ratios of CPU time are to the floor's steps right before and after.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, bar, bar_table, header, table, write_json
from benchmarks.experts import kept_bytes
from benchmarks.methods import Method, losia_step, plain_step
from benchmarks.shapes import DTYPES, Shape
from benchmarks.timing import interleave
from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups


@dataclass
class QuantizedShape(Shape):
    """A Llama whose decoder's linear layers are in NF4 with quantized scales, and its batch."""

    vocabulary: int = 2048

    def model(self) -> Any:
        """Random weights, frozen; the same for every method."""
        model = super().model().requires_grad_(False)
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, in_nf4(child))
        return model


def in_nf4(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' layer of the same weight."""
    import bitsandbytes as bnb

    m, n = linear.weight.shape
    settings: Any = {"quant_type": "nf4", "compress_statistics": True}
    made = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=linear.weight.dtype, **settings)
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=made, **settings).to(linear.weight.device)
    return made


def floor(shape: QuantizedShape) -> Method:
    """Frozen layers of bitsandbytes, forward and the gradient of every layer's input."""
    model = shape.model()
    model.enable_input_require_grads()

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return Method("floor (forward and dx over NF4)", model, step)


def losia(shape: QuantizedShape, factors: Any, name: str) -> Method:
    """This package, with an overlay of one cycle in every layer."""
    config = LoSiAConfig(rank_factor=factors, period=10**6, selection=Drawn())
    model = get_losia_model(shape.model(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-5), lr=1e-5)
    conductor = LoSiA(model, optimizer, config)
    for site in conductor.sites:
        site.subnet.data.mul_(1.01)
        conductor.placement.write_back(site)

    return Method(name, model, losia_step(model, optimizer, conductor), optimizer, conductor)


def qlora(shape: QuantizedShape, rank: int) -> Method:
    """PEFT's LoRA on the same layers."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(shape.model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    return Method(f"QLoRA, r = {rank}", model, plain_step(model, optimizer), optimizer)


METHODS: dict[str, Callable[[QuantizedShape], Method]] = {
    "losia": lambda shape: losia(shape, 0.125, "LoSiA, 1/8 x 1/8"),
    "short": lambda shape: losia(shape, (1, 0.0625), "LoSiA, 1 x 1/16"),
    "qlora": lambda shape: qlora(shape, 16),
    "qlora64": lambda shape: qlora(shape, 64),
}


def peak_of(name: str, shape: QuantizedShape) -> int:
    """Highest resident memory of a process of its own that makes three steps, beyond what it held before, in bytes."""
    source = (
        "import gc\nfrom benchmarks.memory import peak_bytes, reset_peak\nfrom benchmarks.quantized_step import *\n"
        f"shape = QuantizedShape(**{asdict(shape)!r})\n"
        f"method = (METHODS | {{'floor': floor}})[{name!r}](shape)\n"
        "gc.collect(); reset_peak('cpu')\n"
        "for _ in range(3): method.step(shape.tokens())\n"
        "print(peak_bytes('cpu'))"
    )
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def measure(shape: QuantizedShape, rounds: int, budget: float) -> dict[str, Any]:
    """Times and memory of all methods at one shape."""
    tokens, kept = shape.tokens(), {}
    for name, make in {"floor": floor, **METHODS}.items():
        method = make(shape)
        method.step(tokens)
        kept[name] = kept_bytes(method, tokens)
        del method
        gc.collect()
    peaks = {name: peak_of(name, shape) for name in ("floor", *METHODS)}
    baseline, chosen = floor(shape), {name: make(shape) for name, make in METHODS.items()}
    timings = interleave(baseline, list(chosen.values()), tokens, rounds=rounds, budget=budget, clock=time.process_time)
    found = {name: timings[method.name].summary() for name, method in {"floor": baseline, **chosen}.items()}
    bars = []
    for name in ("losia", "short"):
        title = found[name]["name"]
        bars += [
            bar(f"step of {title} / QLoRA's, r = 16", found[name]["ratio"] / found["qlora"]["ratio"], 1.0),
            bar(f"bytes kept for backward of {title} / QLoRA's", kept[name] / kept["qlora"], 1.0),
            bar(f"peak memory of {title} / QLoRA's", peaks[name] / peaks["qlora"], 1.0),
        ]
    return {"shape": asdict(shape), "methods": found, "kept": kept, "peaks": peaks, "bars": bars}


def as_table(entry: dict[str, Any]) -> str:
    """One line a method."""
    rows = []
    for name, found in entry["methods"].items():
        megabytes = [f"{entry[what][name] / 1e6:.0f}" for what in ("kept", "peaks")]
        interval = "{:.3f} to {:.3f}".format(*found["interval"])
        rows.append([found["name"], f"{found['seconds']:.3f}", f"{found['ratio']:.3f}", interval, *megabytes])
    return table(["method", "seconds", "ratio to the floor", "95 % interval", "kept, MB", "peak, MB"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which no further round begins, per dtype")
    parser.add_argument("--json", default=str(RESULTS / "quantized_step.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(header())
    results = []
    for dtype in options.dtype:
        results.append(measure(QuantizedShape(dtype=dtype), options.rounds, options.budget))
        print(f"\n{results[-1]['shape']}\n{as_table(results[-1])}\n\n{bar_table(results[-1]['bars'])}", flush=True)
        write_json(options.json, results)


if __name__ == "__main__":
    main()
