"""`losia-dist allocate`: what subnets of each shape and size would capture, and a configuration made from it."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import yaml

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError

BY = ("module", "layer", "budget")


def add_allocate_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `losia-dist allocate`."""
    parser.add_argument("--model", required=True, help="directory or hub name of a causal language model")
    parser.add_argument("--train_file", required=True, nargs="+", help="data as for losia-dist train")
    parser.add_argument("--form", choices=("instruction", "chat", "text"), help="form of the records (default: detected)")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens per example (1024)")
    parser.add_argument("--micro_batch", type=int, default=4, help="examples per forward pass (4)")
    parser.add_argument("--losia_config", metavar="FILE", help="configuration that is kept but for rank_pattern")
    parser.add_argument(
        "--by",
        choices=BY,
        default="module",
        help="module: the best shape for each kind of module (q_proj, ...); layer: for each layer; budget: shape and size for "
        "each layer, at the total of the configuration (module)",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="YAML file for --losia_config of losia-dist train")


def run_allocate(options: argparse.Namespace) -> list[Path]:
    """Measure, print a table, write the configuration. One process; the model whole, on a GPU if there is one.

    Raises:
        LoSiAError: a model, data or configuration that cannot be used.
    """
    from losia_dist.tools.allocation import allocate, best_shapes, by_kind, measure, shapes_of

    config = LoSiAConfig.read(options.losia_config) if options.losia_config else LoSiAConfig()
    target = Path(options.output)
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"--output {target}: its directory is not there; make it, or give another file.")
    losia, batches = _start(options, config)
    share = config.row_factor * config.column_factor
    sizes = [share / 4, share / 2, share, share * 2, share * 4] if options.by == "budget" else [share]
    candidates = [shape for size in sizes if size <= 1 for shape in shapes_of(size)]
    measured = measure(losia, batches, candidates)
    print(_table(by_kind(measured), share))
    if options.by == "budget":
        elements = sum(site.subnet.numel() for site in losia.sites if not site.is_output)
        pattern = allocate(measured, elements)
    else:
        pattern = best_shapes(by_kind(measured) if options.by == "module" else measured)
    settings = {**config.to_dict(), "rank_pattern": {name: list(factors) for name, factors in pattern.items()}}
    LoSiAConfig.from_dict(settings)  # what is written can be read
    target.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return [target]


def _start(options: argparse.Namespace, config: LoSiAConfig) -> tuple[Any, list[dict[str, Any]]]:
    """The conductor of a converted model, and its calibration batches."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from losia_dist.data import build_dataset, load_records, make_loader
    from losia_dist.model import get_losia_model
    from losia_dist.optim.adamw import LoSiAAdamW
    from losia_dist.run.conductor import LoSiA
    from losia_dist.subnet.groups import losia_parameter_groups

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {options.model}: no model and tokenizer could be read: {error}") from error
    dataset = build_dataset(load_records(options.train_file, form=options.form), tokenizer, options.max_length)
    loader = make_loader(dataset, tokenizer, options.micro_batch)
    batches = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in itertools.islice(loader, config.calibration_batches)
    ]
    settings = {**config.to_dict(), "layers_per_slot": 1, "rank_pattern": None}
    config = LoSiAConfig.from_dict(settings)
    get_losia_model(model.to(device), config)
    return LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-5), lr=1e-5), config), batches


def _table(kinds: dict[str, Any], share: float) -> str:
    """Mean share of importance that each shape of the configured size captures, by kind of module."""
    shapes = [one.factors for one in next(iter(kinds.values())) if abs(one.factors[0] * one.factors[1] / share - 1) < 0.01]
    lines = [f"share of importance captured ({share:.4g} at random)", " " * 12 + "".join(f"{_named(s):>14}" for s in shapes)]
    for kind, found in kinds.items():
        shares = {one.factors: one.share for one in found}
        lines.append(f"{kind:<12}" + "".join(f"{shares[s]:>14.3f}" if s in shares else f"{'':>14}" for s in shapes))
    return "\n".join(lines)


def _named(factors: tuple[float, float]) -> str:
    return " x ".join("1" if factor == 1 else f"1/{1 / factor:.4g}" for factor in factors)
