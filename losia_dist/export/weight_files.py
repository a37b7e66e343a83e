"""Which files of a model directory hold its weights: those that `from_pretrained` would read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_weights(find: Callable[[str], Path | None]) -> tuple[Path | None, Path | None]:
    """(the single file, None), or (None, the index of several), or (None, None) where a model has neither.

    The single file comes first, as in Transformers: an index beside it is left over from an earlier save in several files.

    Args:
        find: the path of a file of the model by its name, or None.
    """
    whole = find(WEIGHTS)
    return (whole, None) if whole is not None else (None, find(INDEX))


def weight_map(directory: str | Path) -> dict[str, str]:
    """Name of every stored weight of a local directory -> name of the file that holds it.

    Raises:
        OSError, ValueError, KeyError or what safetensors raises: files that are missing or damaged.
    """
    directory = Path(directory)
    whole, index = find_weights(lambda name: directory / name if (directory / name).is_file() else None)
    if index is not None:
        stored: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return stored
    with safe_open(str(whole or directory / WEIGHTS), framework="pt") as opened:
        return dict.fromkeys(opened.keys(), WEIGHTS)
