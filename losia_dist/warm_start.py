"""The start of a run: first subnets from calibration batches, and as many groups per slot as the run's length asks for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from losia_dist.config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.formulas import layers_per_slot_for
from losia_dist.localization.backward import Batch, CalibrationBackward, same_noise
from losia_dist.localization.calibration import Located, locate
from losia_dist.localization.inputs import input_sizes, outliers_of
from losia_dist.localization.search import Choice, Query, Search, Sums, greedy, keep_without_signal
from losia_dist.localization.slots import SlotGroup
from losia_dist.subnet.kinds import whole_shape
from losia_dist.subnet.linear import SubnetLinear, TiedSubnetEmbedding

if TYPE_CHECKING:
    from losia_dist.conductor import LoSiA

Batches = Sequence[Batch]
Loss = Callable[[nn.Module, Batch], Tensor]


def locate_all(losia: LoSiA, batches: Batches, compute_loss: Loss | None = None) -> tuple[list[Choice], int]:
    """Choices for all layers of a conductor by the greedy search, and the passes that they took. Nothing is moved.

    Called by all ranks, with equally many micro-batches on each.
    """

    def search_of(layer: SubnetLinear) -> Search:
        kept = (layer.row_index.numel(), layer.col_index.numel())
        return greedy(whole_shape(losia.parameters, layer), kept)

    found, passes = run_searches(losia, search_of, batches, compute_loss)
    return [keep_without_signal(one.result, (one.layer.row_index, one.layer.col_index)) for one in found], passes


def draw_all(losia: LoSiA, batches: Batches, compute_loss: Loss | None = None) -> tuple[list[Choice], int]:
    """First subnets drawn without the input neurons that stand out in the calibration batches, which the conductor notes.

    One forward pass, in evaluation mode. Called by all ranks; nothing is moved. Returns the choices and 1.
    """
    model, limit = _unwrapped(losia), losia.config.outlier_limit
    assert limit is not None
    loss, was_training = compute_loss or _own_loss, model.training

    def run_pass() -> None:
        for batch in batches:
            with torch.compiler.set_stance("force_eager"):  # hooks, for a few batches only
                loss(model, batch)

    model.eval()
    try:
        sizes = input_sizes(losia.layers, run_pass, losia.collectives)
    finally:
        model.train(was_training)
        losia.parameters.settle()
    found = {layer.name: outliers_of(layer, size, limit) for layer, size in zip(losia.layers, sizes, strict=True)}
    losia.outliers = {name: outliers for name, outliers in found.items() if outliers}
    place = SlotGroup("", 0)  # all groups, at once
    wanted = [losia.placement.wanted(layer, 0, losia.outliers) for layer in losia.layers]
    return [losia.localization.choose(place, None, one) for one in wanted], 1


def run_searches(
    losia: LoSiA, search_of: Callable[[SubnetLinear], Generator[Query, Sums, Any]], batches: Batches, compute_loss: Loss | None
) -> tuple[list[Located], int]:
    """Run a search of each layer over the calibration batches; the weights' gradients are formed, and no parameter changes."""
    model = _unwrapped(losia)
    tied = {m.__dict__["head"] for m in model.modules() if isinstance(m, TiedSubnetEmbedding)}
    searches = [
        Located(layer, whole_shape(losia.parameters, layer), search_of(layer), parts=2 if layer in tied else 1)
        for layer in losia.layers
    ]
    backward = CalibrationBackward(model, compute_loss or _own_loss)
    _refuse_reentrant(model)
    device, was_training = losia.layers[0].row_index.device, model.training
    witnesses = [layer.gradient_witness for layer in losia.layers]
    for layer in losia.layers:
        layer.gradient_witness = None  # what calibration shows is no sign that the subnet trains

    def run_pass() -> None:
        for place, batch in enumerate(batches):
            # Not compiled: the embedding is watched by a hook, for a few batches only.
            with same_noise(device, place), torch.compiler.set_stance("force_eager"):
                backward.run(batch)

    model.train()  # activations are recomputed in training mode only
    try:
        passes = locate(searches, run_pass, losia.collectives, kind=losia.config.importance)
    finally:
        model.train(was_training)
        for layer, witness in zip(losia.layers, witnesses, strict=True):
            layer.gradient_witness = witness
        losia.parameters.settle()
    return searches, passes


def _refuse_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        recompute = getattr(module, "_gradient_checkpointing_func", None)
        if not (getattr(module, "gradient_checkpointing", False) and isinstance(recompute, partial)):
            continue
        if recompute.keywords.get("use_reentrant", True):
            raise ConfigError(
                "locating subnets (init='importance') does not work with reentrant gradient checkpointing, which gives a "
                "gradient to parameters only: use gradient_checkpointing_kwargs={'use_reentrant': False} (in the training "
                "script --gradient_checkpointing non-reentrant), or init='random'."
            )


def settled(config: LoSiAConfig, total_steps: int | None, num_groups: int, world_size: int) -> LoSiAConfig:
    """The configuration with layers_per_slot="auto" resolved for a run of this length.

    Raises:
        ConfigError: the length is not known, or too short for one slot a cycle.
    """
    if config.layers_per_slot != "auto":
        return config
    if total_steps is None:
        raise ConfigError(
            "layers_per_slot='auto' needs the length of the run: pass total_steps, the optimizer steps of the whole run, or "
            "give a number."
        )
    groups = layers_per_slot_for(total_steps, num_groups, config.period, config.cycles)
    if groups is None:
        raise ConfigError(
            f"layers_per_slot='auto': {total_steps} steps are too few for {config.cycles} cycle(s) of slots of {config.period} "
            f"steps (period): at least {config.period * config.cycles + 1} are needed. Lower period or cycles, or train longer."
        )
    ranks = world_size if config.localization == "rank_parallel" else 1
    return replace(config, layers_per_slot=-(-groups // ranks))


def layers_per_slot(config: LoSiAConfig) -> int:
    """Of a settled configuration."""
    assert isinstance(config.layers_per_slot, int)
    return config.layers_per_slot


def _unwrapped(losia: LoSiA) -> nn.Module:
    return losia.model.module if isinstance(losia.model, DistributedDataParallel) else losia.model


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss
