"""A plain Transformers directory from a live run or a checkpoint: no trace of subnets, loadable without this library."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from losia_dist.checkpoint.model_directory import copy_tokenizer
from losia_dist.checkpoint.names import plain_entries, unwrap
from losia_dist.checkpoint.offline import export_checkpoint
from losia_dist.conductor import LoSiA
from losia_dist.errors import CheckpointError, ConfigError, LoSiAError
from losia_dist.sharding.interface import ParameterAccess
from losia_dist.sharding.resolve import resolve_parameters

# What from_pretrained looks for, in one file or several.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def export_model(checkpoint_or_losia: Any, directory: str | Path, base_model: Any = None) -> Path:
    """Write the trained model as a plain directory (safetensors, config). Called by all ranks; rank 0 writes.

    The weights are those the model computes with now, in its own dtype, so a loaded copy gives the same logits. They are
    gathered one parameter at a time; rank 0 holds the whole model in host memory while it writes.

    From a checkpoint one weight is in memory at a time, and neither the model nor a GPU is needed.

    Args:
        checkpoint_or_losia: the conductor of a live run (`LoSiA`, or `engine.losia` under DeepSpeed); or a directory that
            checkpoints were saved to (the newest complete one counts), or one step's directory in it.
        directory: made if missing; files of the same name are replaced only after all were written.
        base_model: a model directory whose tokenizer is copied; None: none is.

    Returns:
        the directory.

    Raises:
        ConfigError: neither a conductor nor a path, or the directory cannot be written (on every rank).
        CheckpointError: a checkpoint that is damaged or incomplete (on every rank).
    """
    if isinstance(checkpoint_or_losia, str | Path):
        return _export_checkpoint(checkpoint_or_losia, Path(directory), base_model)
    if not isinstance(checkpoint_or_losia, LoSiA):
        raise ConfigError(
            f"export_model was given a {type(checkpoint_or_losia).__name__}: pass the conductor of a live run (LoSiA, or "
            "engine.losia), or the directory of a checkpoint."
        )
    losia = checkpoint_or_losia
    losia.consolidate()
    written = save_whole_model(losia.model, directory, losia.parameters)
    if base_model is not None and _rank() == 0:
        copy_tokenizer(base_model, written)
    return written


def _export_checkpoint(checkpoint: str | Path, directory: Path, base_model: Any) -> Path:
    failure: tuple[type[LoSiAError], str] | None = None
    if _rank() == 0:
        try:
            export_checkpoint(checkpoint, directory, base_model)
        except CheckpointError as error:
            failure = (CheckpointError, str(error))
        except OSError as error:
            failure = (ConfigError, f"the model could not be written to {directory}: {error}")
    failure = _from_rank_0(failure)
    if failure:
        raise failure[0](failure[1])
    return directory


def save_whole_model(model: nn.Module, directory: str | Path, access: ParameterAccess | None = None) -> Path:
    """Write any model, sharded or not, as a plain directory. Called by all ranks; rank 0 writes."""
    plain = unwrap(model)
    state = _gather(plain, access or resolve_parameters(plain))
    directory, failure = Path(directory), None
    if _rank() == 0:
        try:
            _write(plain, state, directory)
        except Exception as error:  # a full disk is an error of safetensors; the other ranks wait and must hear of any
            failure = f"the model could not be written to {directory}: {type(error).__name__}: {error}"
    failure = _from_rank_0(failure)
    if failure:
        raise ConfigError(failure)
    return directory


@torch.no_grad()
def _gather(model: nn.Module, access: ParameterAccess) -> dict[str, Tensor]:
    """Every tensor of the state dict but LoSiA's own, on rank 0's CPU. Tied names share one tensor."""
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in plain_entries(model):
        if id(tensor) not in gathered:
            whole = access.read_whole(tensor) if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
            gathered[id(tensor)] = whole.cpu() if _rank() == 0 else torch.empty(0)
        state[name] = gathered[id(tensor)]
    return state


def _write(model: nn.Module, state: dict[str, Tensor], directory: Path) -> None:
    """All files into a directory beside the target, or inside one that exists; then they take their places."""
    is_new = not directory.exists()
    beside = directory.with_name(f".{directory.name}.incomplete") if is_new else directory / ".incomplete"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save: Any = getattr(model, "save_pretrained", None)
        if save is not None:
            save(beside, state_dict=state)
            _drop_quantization_note(beside / "config.json")
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, str(beside / "model.safetensors"))
        if is_new:
            os.rename(beside, directory)
        else:
            _replace_weights(beside, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace_weights(beside: Path, directory: Path) -> None:
    """Move files up. The old weights go first, also under names that the new ones do not have: a loader would take them."""
    for pattern in _WEIGHTS:
        for old in directory.glob(pattern):
            old.unlink()
    for file in beside.iterdir():
        os.replace(file, directory / file.name)


def _drop_quantization_note(path: Path) -> None:
    """A model read from a quantized file is saved dequantized; its configuration must not claim otherwise."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _from_rank_0(message: Any) -> Any:
    """What rank 0 says, on every rank, so that all of them stop together."""
    if dist.is_available() and dist.is_initialized():
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]
    return message
