"""Time, memory kept for backward and peak of one optimizer step of a mixture of experts, against its floor.

    python -m benchmarks.experts [--dtype fp32 bf16] [--experts 16 64] [--rounds 15] [--budget 100] [--json FILE]

A Qwen3-MoE of a few layers with random weights. The floor: frozen weights, Transformers' own grouped experts, forward and dx.
Beside it full fine-tuning, and PEFT's LoRA on the same weights (`target_parameters` for experts), of about as many parameters
and of rank 16. `cycle` runs drawn subnets through their slots, and gives the mean of a cycle at period T. All methods of a run
live in one process and take turns; ratios are to the floor's steps right before and after, by the process's own CPU time, so
that others on the machine count little.

Every step has tokens of its own, as in training. In bf16 oneDNN makes a kernel for every number of tokens that an expert is
sent: steps that repeated one batch would spare the floor, whose routing would never change, what every training pays.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle as endlessly
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common import RESULTS, bar, bar_table, header, table, write_json
from benchmarks.kept import KeptStorages
from benchmarks.methods import NEVER, RANK_FACTOR, Method, losia_step, plain_step
from benchmarks.shapes import DTYPES
from benchmarks.timing import Timing, interleave
from losia_dist import Drawn, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups

PERIOD = 50  # T of the mean over a cycle
CYCLE_PERIOD = 2  # every second step of the cycle measured ends a slot
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of the model and its batch."""

    experts: int = 16
    top: int = 4
    layers: int = 4
    hidden: int = 512
    expert_size: int = 256
    vocabulary: int = 2048
    batch: int = 2
    length: int = 512
    dtype: str = "fp32"
    device: str = "cpu"
    checkpointing: bool = False

    def model(self) -> Any:
        """Random weights, every one trainable, the same for every method; made on the device."""
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            moe_intermediate_size=self.expert_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            head_dim=64,
            num_experts=self.experts,
            num_experts_per_tok=self.top,
            norm_topk_prob=True,
            max_position_embeddings=self.length,
            initializer_range=0.05,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[self.dtype])
        try:
            with torch.device(self.device):
                model = Qwen3MoeForCausalLM(config).train()
        finally:
            torch.set_default_dtype(before)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def tokens(self, number: int = 0) -> Tensor:
        """A micro-batch, int64 [batch, length], by its number."""
        generator = torch.Generator().manual_seed(1 + number)
        return torch.randint(0, self.vocabulary, (self.batch, self.length), generator=generator).to(self.device)

    def equal_rank(self) -> int:
        """The LoRA rank that trains about as many parameters as subnets do."""
        hidden, size = self.hidden, self.expert_size
        sizes = [(hidden, hidden, 4), (2 * size, hidden, self.experts), (hidden, size, self.experts)]
        trained = sum(m * n * count for m, n, count in sizes) * RANK_FACTOR**2
        return max(1, round(trained / sum((m + n) * count for m, n, count in sizes)))


def floor(shape: ExpertShape) -> Method:
    """Frozen model, forward and the gradient of every layer's input."""
    model = shape.model().requires_grad_(False)
    model.enable_input_require_grads()

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return Method("floor (forward and dx)", model, step)


def losia(shape: ExpertShape, period: int, name: str) -> Method:
    """This package, with drawn subnets in attention and experts."""
    model, config = shape.model(), LoSiAConfig(rank_factor=RANK_FACTOR, period=period, selection=Drawn())
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-5), lr=1e-5)
    conductor = LoSiA(model, optimizer, config)

    return Method(name, model, losia_step(model, optimizer, conductor), optimizer, conductor)


def lora(shape: ExpertShape, rank: int) -> Method:
    """PEFT's LoRA on attention and, by `target_parameters`, on the fused weights of experts."""
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=list(EXPERTS),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(shape.model(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    return Method(f"LoRA r = {rank}, target_parameters", model, plain_step(model, optimizer), optimizer)


def full(shape: ExpertShape) -> Method:
    """Attention and experts train in full; torch's AdamW with its states in the weights' own dtype."""
    model = shape.model().requires_grad_(False)
    chosen = [p for name, p in model.named_parameters() if "_proj" in name]
    for parameter in chosen:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen, lr=1e-5)
    return Method("full fine-tuning, AdamW", model, plain_step(model, optimizer), optimizer)


METHODS: dict[str, Callable[[ExpertShape], Method]] = {
    "losia": lambda shape: losia(shape, NEVER, "LoSiA, drawn, within a slot"),
    "cycle": lambda shape: losia(shape, CYCLE_PERIOD, "LoSiA, drawn, slots"),
    "lora": lambda shape: lora(shape, shape.equal_rank()),
    "lora16": lambda shape: lora(shape, 16),
    "full": full,
}


def kept_bytes(method: Method, tokens: Tensor) -> int:
    """Bytes that one forward keeps for backward, the model's own parameters and buffers left out; each storage counts once."""
    kept = KeptStorages([*method.model.parameters(), *method.model.buffers()])

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        held = kept.nbytes
    loss.backward()
    return held


def peak_of(name: str, shape: ExpertShape) -> int:
    """Highest resident memory of a process of its own that makes three steps, in bytes."""
    source = (
        "from benchmarks.experts import *\n"
        f"shape = ExpertShape(**{asdict(shape)!r})\n"
        f"method = (METHODS | {{'floor': floor}})[{name!r}](shape)\n"
        "for number in range(3): method.step(shape.tokens(number))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return 1024 * int(found.stdout.split()[-1])


def measure(shape: ExpertShape, rounds: int, budget: float) -> dict[str, Any]:
    """Times and memory of all methods at one shape."""
    tokens = shape.tokens()
    kept = {}
    for name, make in {"floor": floor, **METHODS}.items():
        if name != "cycle":
            method = make(shape)
            method.step(tokens)
            kept[name] = kept_bytes(method, tokens)
            del method
            gc.collect()
    peaks = {name: peak_of(name, shape) for name in ("floor", "losia", "lora", "lora16", "full")}
    baseline, chosen = floor(shape), {name: make(shape) for name, make in METHODS.items()}
    for method in (baseline, *chosen.values()):
        method.step = of_new_tokens(method.step, shape)
    timings = interleave(
        baseline, list(chosen.values()), tokens, rounds=rounds, budget=budget, warmup=4, clock=time.process_time
    )
    found = {name: timings[method.name].summary() for name, method in {"floor": baseline, **chosen}.items()}
    cycle = found["cycle"]
    # The period's last step re-localizes; drawn subnets collect nothing in the others.
    cycle["ratio_of_slot_end"] = (
        Timing(**{**asdict(timings[chosen["cycle"].name])}).summary().get("slot_end_ratio", cycle["ratio"])
    )
    cycle["mean_of_cycle"] = (found["losia"]["ratio"] * (PERIOD - 1) + cycle["ratio_of_slot_end"]) / PERIOD
    ratio = {name: one["ratio"] for name, one in found.items()}
    mean = cycle["mean_of_cycle"]
    least = min(ratio["lora"], ratio["lora16"])
    bars = [
        bar(f"mean of a cycle of drawn subnets, T = {PERIOD} / floor", mean, 1.05 if shape.dtype == "fp32" else 1.12),
        bar("/ LoRA of equal parameters", mean / ratio["lora"], 0.78),
        bar("/ the faster LoRA", mean / least, 0.78),
        bar("bytes kept for backward beyond the floor's / LoRA's", _beyond(kept, "losia") / _beyond(kept, "lora"), 0.15),
        bar("peak memory / LoRA's", peaks["losia"] / peaks["lora"], 1.0),
    ]
    by = "CPU time of the process, new tokens in every step"
    return {"shape": asdict(shape), "timed_by": by, "methods": found, "kept": kept, "peaks": peaks, "bars": bars}


def of_new_tokens(step: Callable[[Tensor], Any], shape: ExpertShape) -> Callable[[Tensor], Any]:
    """Steps of one micro-batch after the other, in place of the given one. They are made before, not while time is taken."""
    batches = endlessly([shape.tokens(number) for number in range(200)])
    return lambda tokens: step(next(batches))


def _beyond(kept: dict[str, int], name: str) -> int:
    return max(0, kept[name] - kept["floor"])


def as_table(entry: dict[str, Any]) -> str:
    """One line a method."""
    rows = []
    for name, found in entry["methods"].items():
        ratio = f"{found['ratio']:.3f}" + (f" (end of a slot {found['ratio_of_slot_end']:.3f})" if name == "cycle" else "")
        megabytes = [f"{entry[what][name] / 1e6:.0f}" if name in entry[what] else "" for what in ("kept", "peaks")]
        rows.append(
            [found["name"], f"{found['seconds']:.3f}", ratio, "{:.3f} to {:.3f}".format(*found["interval"]), *megabytes]
        )
    columns = ["method", "seconds", "ratio to the floor", "95 % interval", "kept for backward, MB", "peak of a process, MB"]
    return table(columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--top", type=int, nargs="+", default=[4, 8], help="as many as --experts")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after which no further round begins, per shape")
    parser.add_argument("--json", default=str(RESULTS / "experts.json"))
    options = parser.parse_args(arguments)
    print(header())
    results = []
    for dtype in options.dtype:
        for experts, top in zip(options.experts, options.top, strict=True):
            shape = ExpertShape(experts=experts, top=top, dtype=dtype)
            results.append(measure(shape, options.rounds, options.budget))
            print(f"\n{shape}\n{as_table(results[-1])}\n\n{bar_table(results[-1]['bars'])}", flush=True)
            write_json(options.json, results)


if __name__ == "__main__":
    main()
