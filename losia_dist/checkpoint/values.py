"""Plain values (schedulers' states, the user's `extra`, random states) as JSON, their tensors set apart. Nothing is pickled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from losia_dist.errors import CheckpointError

_MARKS = ("$tensor", "$array", "$tuple", "$dict")


def encode(value: Any, tensors: dict[str, Tensor], prefix: str, where: str) -> Any:
    """JSON for a nested value of dictionaries, lists, tuples, numbers, strings, None, tensors and numpy arrays.

    Tensors and arrays, of any shape, are added to `tensors` as CPU copies under `prefix/<number>`, in their dtype (unsigned
    numbers wider than a byte as int64); waits for their device. `where` names the value in the error.

    Raises:
        CheckpointError: something else is in it, and where.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        name = f"{prefix}/{len(tensors)}"
        if isinstance(value, Tensor):
            tensors[name] = value.detach().to("cpu", copy=True)
            return {"$tensor": name}
        wide = value.astype(np.int64) if value.dtype.kind == "u" and value.dtype != np.uint8 else value
        tensors[name] = torch.from_numpy(np.array(wide))
        return {"$array": [name, str(value.dtype)]}
    if isinstance(value, list | tuple):
        items = [encode(item, tensors, prefix, f"{where}[{place}]") for place, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        pairs = [
            (encode(key, tensors, prefix, f"a key of {where}"), encode(item, tensors, prefix, f"{where}[{key!r}]"))
            for key, item in value.items()
        ]
        if all(isinstance(key, str) and key not in _MARKS for key in value):
            return dict(pairs)
        return {"$dict": [list(pair) for pair in pairs]}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__name__}, which a checkpoint does not hold: it takes numbers, "
        "strings, lists, tuples, dictionaries, tensors and numpy arrays only. Convert it, or leave it out."
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `encode` was given, shapes and dtypes too; `tensors` maps the names in it to CPU tensors, which are copied."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]].clone()
    if "$array" in value:
        name, dtype = value["$array"]
        return tensors[name].clone().numpy().astype(dtype)
    if "$tuple" in value:
        return tuple(decode(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {decode(key, tensors): decode(item, tensors) for key, item in value["$dict"]}
    return {key: decode(item, tensors) for key, item in value.items()}
