"""The model card (README.md) of an exported model: from what and how it was made, its losses, how to load it, what to cite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from losia_dist._version import __version__
from losia_dist.checkpoint import atomic_files
from losia_dist.config.losia_config import CONFIG_NAME, LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.run.log_files import FACTS, SUMMARY

CARD = "README.md"
MARK = "<!-- written by losia_dist: edit freely, and remove this line to keep your edits -->"
PAPER = "https://arxiv.org/abs/2507.04487"
_CITATION = """@article{losia2025,
  title = {LoSiA: Efficient High-Rank Fine-Tuning via Subnet Localization and Optimization},
  author = {Wang, Xujia and Qi, Yunjia and Xu, Bin},
  journal = {arXiv preprint arXiv:2507.04487},
  year = {2025}
}"""
_OPTIONS = ("learning_rate", "micro_batch", "gradient_accumulation", "max_length", "packing", "weight_decay", "seed")
_FACTS = {"engine": "engine", "precision": "precision", "ranks": "ranks", "steps": "optimizer steps"}
_LOSSES = {
    "train_loss": "training loss at the end",
    "held_out_loss_before": "held-out loss before training",
    "held_out_loss_after": "held-out loss after training",
}


def facts_of_run(directory: Path) -> dict[str, Any]:
    """What a run wrote about itself (losia_run.json, summary.json, losia_config.json); empty where nothing can be read."""
    found: dict[str, Any] = {}
    for name in (FACTS, SUMMARY):
        found |= _read(directory / name)
    config = _read(directory / CONFIG_NAME)
    return found | ({"losia_config": config} if config else {})


def run_of_checkpoint(checkpoint: str | Path) -> Path:
    """The run's directory of a checkpoint, of a directory of them, or itself."""
    path = Path(checkpoint).absolute()
    return next((place for place in (path, *path.parents[:2]) if (place / FACTS).is_file()), path)


def write_card(directory: str | Path, facts: Mapping[str, Any], base_model: Any = None) -> None:
    """Write README.md, unless one is there that this package did not write. One process calls it.

    Args:
        facts: as `facts_of_run` has them; whatever is missing is left out.
        base_model: directory or hub name of the model that was fine-tuned, where the facts do not say it.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(directory) / CARD
    try:
        if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
            atomic_files.write_text(path, card_text(Path(directory).absolute().name, facts, base_model))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


def card_text(name: str, facts: Mapping[str, Any], base_model: Any = None) -> str:
    """The card as text: Markdown behind a YAML head."""
    from huggingface_hub import ModelCardData

    options = facts.get("options") or {}
    base, is_public = _named(str(options.get("model") or base_model or ""))
    head = ModelCardData(
        base_model=base if is_public else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["losia", "losia_dist"] if facts.get("method", "losia") == "losia" else ["losia_dist"],
    )
    of = f" of {_code(base)}" if base else ""
    made = f"A fine-tune{of} of all weights."
    if facts.get("method", "losia") == "losia":
        made = f"A fine-tune{of} by [LoSiA]({PAPER}), which trains a moving part of every weight. A plain model: no adapter."
    parts = [f"---\n{head.to_yaml()}\n---\n{MARK}\n\n# {name}\n\n{made}", _loading(name), _training(facts, options)]
    if facts.get("losia_config"):
        settings = yaml.safe_dump(LoSiAConfig.from_dict(dict(facts["losia_config"])).to_dict(), sort_keys=False)
        parts.append(f"## LoSiA's settings\n\n```yaml\n{settings}```")
    parts.append(f"## Citation\n\n```bibtex\n{_CITATION}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _loading(name: str) -> str:
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n```'
    )


def _training(facts: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    rows = [(meaning, f"{facts[key]:.4f}") for key, meaning in _LOSSES.items() if isinstance(facts.get(key), float)]
    sources = options.get("train_file") or []
    rows += [("data", ", ".join(_code(_named(str(one))[0]) for one in sources))] if sources else []
    rows += [("examples", facts["data"])] if facts.get("data") else []
    rows += [(meaning, facts[key]) for key, meaning in _FACTS.items() if facts.get(key) is not None]
    if facts.get("trainable_parameters"):
        rows.append(("parameters that trained at a time", f"{facts['trainable_parameters']:,}"))
    rows += [(key, options[key]) for key in _OPTIONS if options.get(key) is not None]
    versions = {"losia_dist": __version__} | (facts.get("versions") or {})
    rows.append(("software", ", ".join(f"{package} {version}" for package, version in versions.items())))
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)
    return f"## Training\n\n| | |\n|---|---|\n{table}"


def _named(given: str) -> tuple[str, bool]:
    """The name to be shown, and whether it is one of the hub; of a path its last part, as a card is read by strangers."""
    path = Path(given.rstrip("/")) if given else Path()
    is_local = not given or path.exists() or path.is_absolute() or given.startswith(".") or given.count("/") != 1
    return (path.name if is_local else given), not is_local


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
