"""The class of a checkpoint's model, found again by its name: what knows the rules by which the model is stored."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from losia_dist.checkpoint.reader import Reader
from losia_dist.checkpoint.safetensors_io import Entry
from losia_dist.checkpoint.stored_names import class_conversions, describe_conversion
from losia_dist.errors import CheckpointError
from losia_dist.export.model_directory import write_json_files
from losia_dist.export.stored_form import StoredForm


def stored_form_of(reader: Reader, entries: dict[str, Entry]) -> StoredForm:
    """How Transformers stores the weights of a checkpoint's model; the model is made without memory for its weights.

    Args:
        entries: the weights, by their names in the model.

    Raises:
        CheckpointError: saved by an earlier version; a class that Transformers does not have (the model's own code, which is
            not run here); or rules that this release of Transformers lacks.
    """
    base = reader.base
    if "conversions" not in base:
        raise _refusal(reader, "the version of losia_dist that saved it did not note the rules")
    model = model_without_weights(reader)
    known = [(describe_conversion(rule), rule) for rule in class_conversions(model, add_legacy=True)]
    rules = []
    for noted in base["conversions"]:
        place = next((place for place, (described, _) in enumerate(known) if described == noted), None)
        if place is None:
            kind, sources, targets, *_ = noted
            raise _refusal(reader, f"Transformers has no such rule for the class as {kind} of {sources} to {targets}")
        rules.append(known.pop(place)[1])
    model._weight_conversions = rules
    try:
        return StoredForm(model, entries, rules)
    except Exception as error:  # Transformers' own, of any kind
        raise _refusal(reader, f"its rules fail ({type(error).__name__}: {error})") from error


def model_without_weights(reader: Reader) -> Any:
    """A checkpoint's model on the meta device. Raises: CheckpointError: a class that Transformers does not have."""
    import transformers

    name, config = reader.base["model_class"], reader.base["config"]
    known: Any = getattr(transformers, name, None)
    if config is None or not hasattr(known, "config_class"):
        raise _refusal(reader, f"Transformers has no class {name}, and code of the model's own is not run here")
    try:
        with tempfile.TemporaryDirectory() as place:  # what JSON cannot hold (infinity) is put back only as it reads a file
            write_json_files({"config.json": config}, Path(place))
            read = known.config_class.from_pretrained(place, local_files_only=True)
        with torch.device("meta"):
            return known(read)
    except Exception as error:  # a model's own, of any kind
        raise _refusal(reader, f"the class cannot be made from the configuration ({type(error).__name__}: {error})") from error


def _refusal(reader: Reader, why: str) -> CheckpointError:
    return CheckpointError(
        f"{reader.path} holds a {reader.base['model_class']}, which Transformers stores in another form than it has in memory, "
        f"by rules that were not found again: {why}. Export it from a live run: load_checkpoint, then "
        "export_model(losia, directory)."
    )
