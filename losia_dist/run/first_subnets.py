"""First subnets from calibration batches: located by importance, or drawn without the input neurons that stand out there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from losia_dist.errors import ConfigError
from losia_dist.localization.backward import Batch, CalibrationBackward, same_noise
from losia_dist.localization.calibration import SearchOfLayers, locate
from losia_dist.localization.inputs import input_sizes, outliers_of
from losia_dist.localization.search import Choice, greedy, keep_without_signal
from losia_dist.run.parts import RunParts
from losia_dist.sharding.expert_parallel import refuse_calibration
from losia_dist.subnet.input_readers import InputReaders
from losia_dist.subnet.linear import TiedSubnetEmbedding
from losia_dist.subnet.site import Site

Batches = Sequence[Batch]
Loss = Callable[[nn.Module, Batch], Tensor]


def check_batches(batches: Batches, parts: RunParts, steps: int, in_mid_step: bool) -> None:
    """Refuse calibration batches of unlike number, or too late. Called by all ranks.

    Raises:
        ConfigError: as `LoSiA.locate`. Same on every rank.
    """
    mine = torch.tensor([len(batches)], device=parts.sites[0].row_index.device)
    counts = parts.collectives.stack(mine).flatten().tolist()
    if len(set(counts)) > 1 or not counts[0]:
        raise ConfigError(f"calibration batches per rank: {counts}; at least one is needed, equally many on every rank.")
    if steps or in_mid_step:
        raise ConfigError(f"subnets are located before training begins; {steps} steps have been done.")


def locate_all(
    model: nn.Module,
    parts: RunParts,
    importance: str,
    readers: InputReaders,
    batches: Batches,
    compute_loss: Loss | None = None,
) -> tuple[list[Choice], int]:
    """Choices for all layers by the greedy search, and the passes that they took. Nothing is moved.

    The weights' gradients are formed, and no parameter changes. Called by all ranks, with equally many micro-batches on each.

    importance: the kind of it, of the configuration. readers: where layers share columns, one forward pass of the first
    micro-batch shows which do.
    """
    refuse_calibration(parts.sites)
    model = _unwrapped(model)
    _refuse_reentrant(model)
    tied = {m.__dict__["head"].site for m in model.modules() if isinstance(m, TiedSubnetEmbedding)}
    if readers.watches:
        _run_forward(model, parts, batches[:1], compute_loss)
        readers.forget()
    searches = [
        SearchOfLayers(family, greedy([(site.shape, site.subnet_shape) for site in family]), [1 + (s in tied) for s in family])
        for family in readers.families(parts.sites)
    ]
    backward = CalibrationBackward(model, compute_loss or _own_loss)
    device, was_training = parts.sites[0].row_index.device, model.training
    witnesses = [site.gradient_witness for site in parts.sites]
    for site in parts.sites:
        site.gradient_witness = None  # what calibration shows is no sign that the subnet trains

    def run_pass() -> None:
        for place, batch in enumerate(batches):
            # Not compiled: the embedding is watched by a hook, for a few batches only.
            with same_noise(device, place), torch.compiler.set_stance("force_eager"):
                backward.run(batch)

    model.train()  # activations are recomputed in training mode only
    try:
        with parts.parameters.without_reduction():
            passes = locate(searches, run_pass, parts.collectives, kind=importance, sequence=parts.sequence)
    finally:
        model.train(was_training)
        for site, witness in zip(parts.sites, witnesses, strict=True):
            site.gradient_witness = witness
        parts.parameters.reshard()
    return _choices(searches, parts.sites), passes


def find_outliers(
    model: nn.Module, parts: RunParts, limit: float, batches: Batches, compute_loss: Loss | None = None
) -> dict[str, list[int]]:
    """Layer (or expert, `Site.matrix_names`) -> input neurons that stand out in the calibration batches, of those that have
    some.

    One forward pass, in evaluation mode. Called by all ranks; nothing is moved.

    limit: `outlier_limit` of the configuration.
    """
    sizes = input_sizes(parts.sites, partial(_run_forward, _unwrapped(model), parts, batches, compute_loss), parts.collectives)
    found: dict[str, list[int]] = {}
    for site, size in zip(parts.sites, sizes, strict=True):
        found |= outliers_of(site, size, limit)
    return found


@torch.no_grad()
def _run_forward(model: nn.Module, parts: RunParts, batches: Batches, compute_loss: Loss | None) -> None:
    """Forward passes of an unwrapped model, in evaluation mode."""
    loss, was_training = compute_loss or _own_loss, model.training
    model.eval()
    try:
        for batch in batches:
            with torch.compiler.set_stance("force_eager"):  # what a layer is called with is watched, for a few batches only
                loss(model, batch)
    finally:
        model.train(was_training)
        parts.parameters.reshard()


def _choices(searches: Sequence[SearchOfLayers], sites: Sequence[Site]) -> list[Choice]:
    found: dict[Site, Choice] = {}
    for one in searches:
        present = [(site.row_index, site.col_index) for site in one.sites]
        found.update(zip(one.sites, keep_without_signal(one.results, present), strict=True))
    return [found[site] for site in sites]


def _refuse_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        recompute = getattr(module, "_gradient_checkpointing_func", None)
        if not (getattr(module, "gradient_checkpointing", False) and isinstance(recompute, partial)):
            continue
        if recompute.keywords.get("use_reentrant", True):
            raise ConfigError(
                "locating subnets (start='importance') does not work with reentrant gradient checkpointing, which gives a "
                "gradient to parameters only: use gradient_checkpointing_kwargs={'use_reentrant': False} (in the training "
                "script --gradient_checkpointing non-reentrant), or start='random'."
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss
