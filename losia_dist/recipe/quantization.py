"""`--quantization`: how the base model is loaded in fewer bits. No collectives in here."""

from __future__ import annotations

from typing import Any

import torch

from losia_dist.errors import ConfigError
from losia_dist.recipe.choice import EngineChoice
from losia_dist.recipe.environment import Process

QUANTIZATIONS = ("nf4", "fp4", "int8", "fp8")


def quantization_arguments(form: str | None, config: Any, choice: EngineChoice, process: Process) -> dict[str, Any]:
    """Arguments of `from_pretrained` that make it quantize each weight as it reads it, on this rank's device.

    Args:
        form: of --quantization; None: as the model's files have it.
        config: of the model, from `AutoConfig`.

    Raises:
        ConfigError: the files are quantized already, in whatever form; or a package is missing.
    """
    stored = getattr(config, "quantization_config", None)
    if form is None:
        return {} if stored is None else {"device_map": {"": process.device}}
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", "?")
        raise ConfigError(
            f"--quantization {form}, and the model's files are quantized already ({getattr(method, 'value', method)}): leave "
            "it out, or give the original model."
        )
    import transformers

    if form == "fp8":
        settings: Any = transformers.FineGrainedFP8Config()
    else:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"--quantization {form} needs bitsandbytes: pip install bitsandbytes.") from error
        dtype = torch.bfloat16 if choice.precision == "bf16" else torch.float32
        if form == "int8":
            settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
        else:
            settings = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=form,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
    return {"quantization_config": settings, "device_map": {"": process.device}}
