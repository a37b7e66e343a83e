"""`--quantization`: how the base model is loaded in fewer bits, and which of two models is written in the end."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from losia_dist.errors import ConfigError
from losia_dist.export.onto import computing_onto
from losia_dist.recipe.choice import EngineChoice
from losia_dist.recipe.engines import Engine
from losia_dist.recipe.environment import Process
from losia_dist.recipe.heldout import held_out_loss
from losia_dist.recipe.loop import Reporter
from losia_dist.recipe.weights.model_files import local_directory
from losia_dist.recipe.weights.quantized_experts import four_bit_settings


def quantization_arguments(form: str | None, config: Any, choice: EngineChoice, process: Process) -> dict[str, Any]:
    """Arguments of `from_pretrained` that make it quantize each weight as it reads it, on this rank's device. No collectives.

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

    is_cut = False
    if form == "fp8":
        settings: Any = transformers.FineGrainedFP8Config()
    else:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"--quantization {form} needs bitsandbytes: pip install bitsandbytes.") from error
        dtype = torch.bfloat16 if choice.precision == "bf16" else torch.float32
        # Where each rank is to keep a part of every weight, a GPU need not hold all of them before; they are quantized on it.
        # Rank 0 sends its codes when they are cut.
        is_cut = choice.cuts_weights and process.world_size > 1 and form != "int8"
        settings = (
            transformers.BitsAndBytesConfig(load_in_8bit=True)
            if form == "int8"
            else four_bit_settings(form, dtype, keeps_codes=not is_cut or process.rank == 0)
        )
    return {"quantization_config": settings, "device_map": {"": torch.device("cpu") if is_cut else process.device}}


def choose_export(run: Engine, reporter: Reporter, options: argparse.Namespace) -> bool:
    """Whether what training changed is written onto the original's weights (`--export`). Called by all ranks, after training.

    "better": evaluates the model of the original's weights too, which reads them from their files for every batch; the loss
    stands in the summary as `held_out_loss_onto_original`.

    Raises:
        LoSiAError: the original's files lack a weight (on every rank).
    """
    if options.export != "better" or run.losia is None:
        return bool(options.export == "onto")
    with computing_onto(run.losia, local_directory(options.model)):
        assert reporter.loader is not None
        onto = reporter.summary["held_out_loss_onto_original"] = held_out_loss(run, reporter.loader)
    trained = reporter.summary["held_out_loss_after"]
    names = ["the model that trained", "its changes onto the original's weights"]
    better = names[onto < trained]
    reporter.log.say(f"held-out loss: {trained:.4f} of {names[0]}, {onto:.4f} of {names[1]}; written: {better}")
    return bool(onto < trained)
