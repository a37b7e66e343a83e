"""A plain Transformers directory from a live run or a checkpoint: no trace of subnets, loadable without this library."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losia_dist.checkpoint import atomic_files
from losia_dist.checkpoint.session import session_of
from losia_dist.checkpoint.stored_names import conversions_of
from losia_dist.checkpoint.tensor_names import plain_entries, unwrap
from losia_dist.errors import ConfigError
from losia_dist.export.inference import missing_for_inference
from losia_dist.export.model_card import facts_of_run, run_of_checkpoint, write_card
from losia_dist.export.model_directory import Read, write_model_directory
from losia_dist.export.offline import export_checkpoint
from losia_dist.export.onto import OntoOriginal
from losia_dist.export.stored_form import StoredForm, StoredWeights
from losia_dist.ranks.agreement import Agreement
from losia_dist.run.conductor import LoSiA
from losia_dist.sharding.expert_parallel import whole_for_saving
from losia_dist.sharding.interface import ParameterAccess
from losia_dist.sharding.resolve import resolve_parameters


def export_model(
    checkpoint_or_losia: Any,
    directory: str | Path,
    base_model: Any = None,
    tokenizer: Any = None,
    *,
    onto: bool = False,
) -> Path:
    """Write the trained model as a plain directory (safetensors, config, tokenizer). Called by all ranks; rank 0 writes.

    The weights are those the model computes with now, in its own dtype, so a loaded copy gives the same logits. One weight is
    in memory at a time beyond what the ranks hold anyway. What Transformers stores in another form than it has in memory (the
    experts of most mixtures: one tensor of a layer there, one of each expert in the files) is written in that form, and what
    goes into it together, at most a layer, is one weight here.

    From a checkpoint neither the model nor a GPU is needed.

    A token that ends a turn in the tokenizer's chat template, or its eos, that generation_config.json lacks is added to its
    eos_token_id, with a warning. README.md becomes a model card, unless there is one of somebody else. Another warning names
    what the directory lacks for inference: a tokenizer, a processor, code.

    Args:
        checkpoint_or_losia: the conductor of a live run (`LoSiA`, or `engine.losia` under DeepSpeed); or a directory that
            checkpoints were saved to (the newest complete one counts), one step's directory in it, or a run's output
            directory.
        directory: made if missing; what is in it changes only after all was written.
        base_model: directory of the model that was fine-tuned, of which everything is copied but weights and training state:
            tokenizer, processors, chat templates, `.py` files of the model's own; None: nothing is.
        tokenizer: the tokenizer or processor of the run, which is written too; it takes the place of the base's.
        onto: of a run over a quantized base: write the weights of base_model, the original, with what training changed added to
            them, instead of the values of their codes with it, which are what trained.

    Returns:
        the directory.

    Raises:
        ConfigError: neither a conductor nor a path, or the directory cannot be written (on every rank).
        CheckpointError: a checkpoint that is damaged or incomplete, not enough space, or `base_model` is no directory (on
            every rank). The directory is as it was then.
    """
    directory = Path(directory)
    if isinstance(checkpoint_or_losia, str | Path):
        agreement = Agreement.of_all()
        agreement.on_first(None, lambda: str(export_checkpoint(checkpoint_or_losia, directory, base_model, tokenizer, onto)))
    elif isinstance(checkpoint_or_losia, LoSiA):
        losia = checkpoint_or_losia
        losia.consolidate()
        agreement = session_of(losia).agreement
        options: dict[str, Any] = {"base_model": base_model, "tokenizer": tokenizer, "agreement": agreement}
        access = losia.parameters
        if onto:
            access = agreement.attempt(None, lambda: OntoOriginal(losia.model, access, base_model))
        save_whole_model(losia.model, directory, access, **options)
    else:
        raise ConfigError(
            f"export_model was given a {type(checkpoint_or_losia).__name__}: pass the conductor of a live run (LoSiA, or "
            "engine.losia), or the directory of a checkpoint."
        )
    agreement.on_first(None, lambda: write_card(directory, *_facts(checkpoint_or_losia, base_model)))
    missing = missing_for_inference(directory) if agreement.rank == 0 else []
    if missing:
        warnings.warn(f"{directory} holds the model's weights, and for inference it lacks {'; '.join(missing)}.", stacklevel=2)
    return directory


def _facts(source: Any, base_model: Any) -> tuple[dict[str, Any], Any]:
    """What the model card says of a live run, or of a checkpoint's; and the model that was fine-tuned."""
    if not isinstance(source, LoSiA):
        return facts_of_run(run_of_checkpoint(source)), base_model
    facts = {"losia_config": source.config.to_dict(), "steps": source.steps}
    return facts, getattr(getattr(unwrap(source.model), "config", None), "_name_or_path", None) or base_model


def save_whole_model(
    model: nn.Module,
    directory: str | Path,
    access: ParameterAccess | None = None,
    *,
    base_model: str | Path | None = None,
    tokenizer: Any = None,
    agreement: Agreement | None = None,
) -> Path:
    """Write any model, sharded or not, as `export_model` does. Called by all ranks; rank 0 writes.

    Args:
        access: to the model's weights; None: found out.
        base_model, tokenizer: as for `export_model`.
        agreement: of all ranks; None: one is made.
    """
    plain: Any = unwrap(model)
    access, agreement = access or resolve_parameters(plain), agreement or Agreement.of_all()
    named = dict(plain_entries(plain))
    named = _stored_once(plain, named) if hasattr(plain, "save_pretrained") else named
    entries = {name: atomic_files.Entry(_dtype(access, tensor), _shape(access, tensor)) for name, tensor in named.items()}
    state: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        return _read(access, named[name])

    weights: Read = read
    if conversions_of(plain):
        form = _stored_form(plain, entries, agreement)
        if form is None:
            state, entries = _gather(plain, access), {}
        else:
            stored = StoredWeights(form, read, keeps=agreement.rank == 0)
            weights, entries = stored.read, stored.entries
    write_model_directory(
        directory,
        entries,
        weights,
        partial(write_texts, plain, state),
        base_model=base_model,
        tokenizer=tokenizer,
        agreement=agreement,
    )
    return Path(directory)


def _stored_form(plain: Any, entries: dict[str, atomic_files.Entry], agreement: Agreement) -> StoredForm | None:
    """None: its form is known to this release's `save_pretrained` alone, which takes all weights at once."""
    try:
        return StoredForm(plain, entries, conversions_of(plain))
    except Exception as error:  # the rules' own, of any kind; or this release keeps them elsewhere
        if agreement.rank == 0:
            warnings.warn(
                f"Transformers' rules for storing {type(plain).__name__} could not be followed weight by weight "
                f"({type(error).__name__}: {error}): rank 0 gathers the whole model in host memory to export it.",
                stacklevel=4,
            )
        return None


def write_texts(model: Any, state: dict[str, Tensor], directory: Path) -> None:
    """Lets the model's own class write its configuration, and code that it brings; and its weights where `state` has them."""
    if hasattr(model, "save_pretrained"):
        # The class's: a model with subnets refuses its own, which knows nothing of them.
        with whole_for_saving(model), _without_bars():
            type(model).save_pretrained(model, directory, state_dict=state)
        _drop_quantization_note(directory / "config.json")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers would show a bar for the weights, of which it writes none here."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _stored_once(model: nn.Module, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the further names of shared tensors, and what the model's class leaves out: as `save_pretrained` has it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    kept = {min(same, key=lambda name: name in tied) for same in names.values()}
    return {name: tensor for name, tensor in named.items() if name in kept - ignored}


@torch.no_grad()
def _gather(model: nn.Module, access: ParameterAccess) -> dict[str, Tensor]:
    """Every tensor of the state dict but LoSiA's own, on rank 0's CPU. Tied names share one tensor."""
    is_first = torch.distributed.get_rank() == 0 if torch.distributed.is_initialized() else True
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in plain_entries(model):
        if id(tensor) not in gathered:
            whole = _read(access, tensor)
            gathered[id(tensor)] = whole.cpu() if is_first else torch.empty(0)
        state[name] = gathered[id(tensor)]
    return state


@torch.no_grad()
def _read(access: ParameterAccess, tensor: Tensor) -> Tensor:
    return access.read_whole(tensor) if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _shape(access: ParameterAccess, tensor: Tensor) -> tuple[int, ...]:
    return access.shape(tensor) if isinstance(tensor, nn.Parameter) else tuple(tensor.shape)


def _dtype(access: ParameterAccess, tensor: Tensor) -> torch.dtype:
    return access.dtype(tensor) if isinstance(tensor, nn.Parameter) else tensor.dtype


def _drop_quantization_note(path: Path) -> None:
    """A model read from a quantized file is saved dequantized; its configuration must not claim otherwise."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
