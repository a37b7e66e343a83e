"""Which files hold a model's weights, in a directory or from the hub, and whether they can be read in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from losia_dist.export.weight_files import find_weights as locate
from losia_dist.recipe.weights.stored import StoredTensor, open_files


class ReadWhole(Exception):
    """These weights cannot be read in parts; the message says why, as the end of a sentence ("..., because it ...")."""


def find_weights(name: str, config: Any) -> dict[str, StoredTensor]:
    """Every stored tensor of a model by its name on disk; a hub model is downloaded as `from_pretrained` does it.

    Args:
        name: directory or hub name.
        config: the model's configuration.

    Raises:
        ReadWhole: no safetensors files, or weights that are more than a list of tensors.
        ConfigError: files that are missing, truncated, damaged or not of one model.
        OSError: the hub cannot be reached.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ReadWhole("is quantized")
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        raise ReadWhole("names weight files of its own")
    if _find(name, "adapter_config.json") is not None:
        raise ReadWhole("is an adapter on another model")
    whole, index = locate(lambda file: _find(name, file))
    if whole is None and index is None:
        raise ReadWhole("has no safetensors files")
    stored = open_files([] if whole is None else [whole], index, lambda file: _find(name, file) or Path(name) / file)
    for key, tensor in stored.items():
        if tensor.dtype is None:
            raise ReadWhole(f"stores {key} in a format of its own")
    return stored


def local_directory(name: str) -> Path | None:
    """Where a model's files lie on this machine: the directory itself, or the hub's cache of it; None: not there."""
    config = _find(name, "config.json")
    return None if config is None else config.parent


def _find(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
