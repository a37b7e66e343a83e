"""Names and forms of weights on disk against those of a model that is about to be read in parts (`export.loaded_form`)."""

from __future__ import annotations

import re
from typing import Any

import torch

from losia_dist.export import loaded_form
from losia_dist.export.loaded_form import Naming
from losia_dist.recipe.weights.model_files import ReadWhole


def match_names(model: Any, stored: list[str]) -> Naming:
    """Place every stored tensor by the rules that `from_pretrained` loads with, in its order.

    model: on the meta device or not; its conversion rules are noted on it, as loading does, for saving under the old names.

    Raises:
        ReadWhole: this release of Transformers keeps its rules elsewhere.
    """
    known: dict[str, torch.dtype | None] = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    try:
        naming = loaded_form.match_names(model, stored, known)
    except ImportError as error:
        raise ReadWhole(f"is read by rules that this release of Transformers keeps elsewhere ({error})") from error
    model._weight_conversions = naming.used
    return naming


def keep_precision(model: Any, dtype: torch.dtype) -> None:
    """Give the meta parameters that an architecture keeps in fp32 in a bf16 model their dtype, as loading does."""
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None)
    if not patterns or dtype != torch.bfloat16:
        return
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, parameter in model.named_parameters():
        if kept.search(name) and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
