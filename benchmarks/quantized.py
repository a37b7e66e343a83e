"""python -m benchmarks.quantized: what training over a base in 4 bits keeps of a run's gain, by how subnets leave it.

The GSM8K task of benchmarks.quality, 60 steps of four problems, SmolLM2-135M. Subnets of the preset `short` are drawn anew in
all layers every ten steps, the last time after the last step, so that all that was learned has been left by its subnet when
it is measured. "exact" keeps it in fp32, "nearest" rounds it to the nearest code, as merging an adapter into a quantized base
does. QLoRA has as many parameters. Runs are appended to --runs as they finish, and are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import header
from benchmarks.quality.loss import mean_loss
from benchmarks.quality.methods import METHODS, Method, equal_rank, lora, losia
from benchmarks.quality.setting import Setting
from benchmarks.quality.training import Bench, fit
from losia_dist.subnet.packed import PackedWeight

# name -> (form of the base, method, how subnets leave)
WAYS: dict[str, tuple[str | None, str, str | None]] = {
    "unquantized": (None, "losia", None),
    "exact": ("nf4", "losia", "fp32"),
    "nf4": ("nf4", "losia", "nf4"),
    "int8": ("nf4", "losia", "int8"),
    "bf16": ("nf4", "losia", "bf16"),
    "stochastic": ("nf4", "losia", "stochastic"),
    "nearest": ("nf4", "losia", "stochastic"),
    "QLoRA": ("nf4", "lora", None),
}
_before: dict[str | None, dict[str, float]] = {}
MOVING: dict[str, Any] = {"rank_factor": [1, 0.0625], "selection": "random", "period": 10, "layers_per_slot": 30}


def main() -> None:
    """Make what is missing, and print the table of all runs of the store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/results/quantized.jsonl"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(header())
    # Registered for this benchmark alone: `fit` finds methods by name.
    METHODS["quantized losia"] = Method("LoSiA, drawn anew", 2e-3, losia)
    METHODS["quantized lora"] = Method("QLoRA", 2e-3, lora)
    bench: Bench | None = None
    for seed in options.seeds:
        for way in options.ways:
            if any(
                one["way"] == way and one["seed"] == seed and one["steps"] == options.steps for one in _stored(options.runs)
            ):
                continue
            bench = bench or Bench.load(options.model, options.data, "fp32")
            record = {"way": way, "seed": seed, "steps": options.steps, **_run(bench, options.model, way, seed, options.steps)}
            print(
                f"{way}, seed {seed}: held-out {record['before']['held_out']:.4f} -> {record['after']['held_out']:.4f}",
                flush=True,
            )
            options.runs.parent.mkdir(parents=True, exist_ok=True)
            with options.runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(_table([one for one in _stored(options.runs) if one["steps"] == options.steps]))


def _run(bench: Bench, model: str, way: str, seed: int, steps: int) -> dict[str, Any]:
    form, kind, retired = WAYS[way]
    data = bench.data("gsm8k")
    # The rank from the weights as they were: codes have other shapes.
    rank = {"equal_to": 0.0625, "rank": equal_rank(bench.model, 0.0625)}
    options = {**MOVING, "retired": retired} if kind == "losia" else rank
    setting = Setting(
        task="gsm8k", method=f"quantized {kind}", rate=2e-3, seed=seed, steps=steps, options=options, precision="fp32"
    )
    fresh = bench.fresh if form is None else lambda: _quantized(model, form)

    def losses(of: Any) -> dict[str, float]:
        # Few, since every run is compared with another on the same ones.
        measured = {"held_out": data.batches["choice"], "unrelated": bench.unrelated[:4]}
        return {name: mean_loss(of, batches, "fp32") for name, batches in measured.items()}

    if form not in _before:
        _before[form] = losses(fresh())
    rounded = PackedWeight.rounded
    try:
        if way == "nearest":
            PackedWeight.rounded = _nearest  # type: ignore[method-assign]
        done = fit(fresh(), fresh, data, setting)
        after = losses(done.trained.model)
    finally:
        PackedWeight.rounded = rounded  # type: ignore[method-assign]
    return {"before": _before[form], "after": after, "parameters": sum(p.numel() for p in done.trained.parameters)}


def _nearest(packed: PackedWeight, flat: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest levels, in the place of `PackedWeight.rounded`."""
    packed.moves += 1
    levels = packed._levels(flat.device)
    scaled = values.float() / packed._scale_at(flat).clamp(min=1e-30)
    return (scaled.unsqueeze(-1) - levels).abs().argmin(-1)


def _quantized(model: str, form: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=settings, dtype=torch.float32)


def _stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _table(records: list[dict[str, Any]]) -> str:
    def mean(way: str, of: Callable[[dict[str, Any]], float]) -> float | None:
        found = [of(one) for one in records if one["way"] == way]
        return statistics.fmean(found) if found else None

    def share(way: str, beside: str) -> str:
        pairs = [
            (_gain(one), _gain(other))
            for one in records
            for other in records
            if (one["way"], other["way"]) == (way, beside) and one["seed"] == other["seed"]
        ]
        return f"{100 * statistics.fmean(a / b for a, b in pairs):.2f} %" if pairs else "-"

    lines = [
        "| what subnets leave | seeds | held-out before | after | of exact's gain | of unquantized | unrelated text |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way in WAYS:
        seeds = sum(one["way"] == way for one in records)
        if seeds:
            before, after = (mean(way, lambda one, when=when: one[when]["held_out"]) for when in ("before", "after"))
            other = mean(way, lambda one: one["after"]["unrelated"] - one["before"]["unrelated"])
            shares = " | ".join(share(way, beside) for beside in ("exact", "unquantized"))
            lines.append(f"| {way} | {seeds} | {before:.4f} | {after:.4f} | {shares} | {other:+.4f} |")
    return "\n".join(lines)


def _gain(record: dict[str, Any]) -> float:
    return float(record["before"]["held_out"] - record["after"]["held_out"])


if __name__ == "__main__":
    main()
