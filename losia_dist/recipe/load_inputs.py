"""The model, which every rank reads for itself before training. No collectives in here."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.data import prepare_for_packing
from losia_dist.errors import ConfigError, UnsupportedError, some
from losia_dist.loss import use_chunked_loss
from losia_dist.model import get_losia_model
from losia_dist.recipe.choice import EngineChoice
from losia_dist.recipe.environment import Process
from losia_dist.recipe.offloaded import offload_checkpoints
from losia_dist.recipe.quantization import quantization_arguments
from losia_dist.recipe.weights.empty import check_buffers, parameters_on_meta
from losia_dist.recipe.weights.model_files import ReadWhole, find_weights
from losia_dist.recipe.weights.renaming import keep_precision
from losia_dist.recipe.weights.streamed import StreamedWeights, missing_message


@dataclass
class LoadedModel:
    """What trains. flatten: whether packed rows must be laid end to end. use_cache: as the model came.

    weights: where the engine reads the model's values from, which is on the meta device then; None: the model has them (all
    ranks', or rank 0's alone for FSDP2). notes: what is to be said about the loading.
    """

    model: Any
    flatten: bool
    use_cache: bool
    weights: StreamedWeights | None
    notes: list[str]

    def fingerprint(self) -> dict[str, Any]:
        """Numbers that must be equal on all ranks, since each takes its part of the weights from the files it sees."""
        return {"read whole": True} if self.weights is None else self.weights.fingerprint()


def load(options: argparse.Namespace, config: LoSiAConfig | None, choice: EngineChoice, process: Process) -> LoadedModel:
    """Read the model and convert it.

    Raises:
        LoSiAError: something is missing, malformed, or does not fit.
    """
    if process.rank != 0:
        disable_progress_bar()  # of reading the weights, which every rank would show
    torch.manual_seed(options.seed)
    model, weights, notes = load_model(options, choice, process)
    use_cache = model.config.use_cache
    flatten = prepare_for_packing(model) if options.packing else True
    if config is not None:
        model = get_losia_model(model, config)
    if options.tiled_mlp > 1:
        from losia_dist.integrations.deepspeed.tiled_mlp import TiledForward, use_tiled_mlp

        try:
            use_tiled_mlp(model, options.tiled_mlp)
        except (ConfigError, UnsupportedError) as error:
            raise type(error)(f"--tiled_mlp {options.tiled_mlp}: {error}") from error
        tiles = [module.tiles for module in model.modules() if isinstance(module, TiledForward)]
        notes.append(f"{len(tiles)} MLPs compute a micro-batch in {tiles[0]} tiles each")
    if options.loss == "chunked":
        use_chunked_loss(model, options.loss_chunk)
    return LoadedModel(model, flatten, use_cache, weights, notes)


def check_writable(directory: Path) -> None:
    """Raises: ConfigError when the output cannot be written there."""
    probe = directory / f".probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {directory} cannot be written: {error.strerror}. Give a directory that can be made or written."
        ) from error


def load_model(
    options: argparse.Namespace, choice: EngineChoice, process: Process
) -> tuple[Any, StreamedWeights | None, list[str]]:
    """The model; where its values are read from, if it is on the meta device on every rank; and what is to be said of it.

    Where each rank keeps a part of every weight, no rank reads more than its part, if the files allow it. A quantized model is
    read whole by each rank, in its codes, a weight at a time. Each rank by itself.

    Raises:
        ConfigError: the model cannot be loaded, or some parameter of it is in no file.
    """
    arguments: dict[str, Any] = {
        "dtype": torch.bfloat16 if choice.precision == "bf16" else torch.float32,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.attn_implementation:
        arguments["attn_implementation"] = options.attn_implementation
    weights, notes = None, []
    try:
        stored = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        quantized = quantization_arguments(options.quantization, stored, choice, process) if options.losia else {}
        arguments |= quantized
        try:
            if quantized:
                raise ReadWhole
            if not choice.cuts_weights or process.world_size == 1:
                raise ReadWhole
            model, weights = _in_parts(options.model, arguments, choice)
            if weights.left_over:
                notes.append(f"not in {type(model).__name__}, and left out: {some(weights.left_over, 3)}")
        except ReadWhole as reason:
            if reason.args:
                reader = "rank 0 reads" if choice.sharding is not None else "every rank reads"
                notes.append(f"{options.model} {reason}: {reader} all of it into memory")
            if choice.sharding is not None and process.rank != 0 and not quantized:
                model = _without_weights(options.model, arguments)
            else:
                model = _whole(options.model, arguments)
    except ConfigError as error:
        raise ConfigError(f"--model {options.model}: {error}") from error
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--model {options.model}: the model could not be loaded: {error}") from error
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(p.name == "num_items_in_batch" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ConfigError(
            f"--model {options.model}: {type(model).__name__}.forward takes no num_items_in_batch, which the mean loss over a "
            "global batch needs. Use a model class of Transformers 5."
        )
    if choice.checkpointing != "off":
        reentrant = choice.checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant and not options.losia:
            model.enable_input_require_grads()
        if choice.checkpointing == "offloaded":
            offload_checkpoints(model)
    return model, weights, notes


def _in_parts(name: str, arguments: dict[str, Any], choice: EngineChoice) -> tuple[Any, StreamedWeights]:
    """The model on the meta device, and where its weights are read from. Raises: ReadWhole, ConfigError, OSError."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=arguments["trust_remote_code"])
    stored = find_weights(name, config)
    model = _without_weights(name, arguments)
    check_buffers(model)
    if not choice.is_zero3:  # which keeps every parameter in one dtype
        keep_precision(model, arguments["dtype"])
    return model, StreamedWeights(model, stored)


def _whole(name: str, arguments: dict[str, Any]) -> Any:
    """The model with all its weights. Raises: ConfigError where a parameter is in none of its files."""
    model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
    lost = sorted(set(found["missing_keys"]) & dict(model.named_parameters()).keys())
    if lost:
        raise ConfigError(missing_message(model, lost))
    return model


def _without_weights(name: str, arguments: dict[str, Any]) -> Any:
    """The model with its parameters on the meta device, its shared ones shared, its buffers as they are."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=arguments["trust_remote_code"])
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, **arguments)
    model.tie_weights()
    with contextlib.suppress(OSError):  # a model need not bring one
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()  # as from_pretrained gives it
