"""Training runs that stop, save and go on. Functions here run on ranks of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from losia_dist import LoSiA, LoSiAConfig, load_checkpoint, save_checkpoint
from losia_dist.checkpoint.tensor_names import unwrap
from tests.support.training import (
    Run,
    _deepspeed_loop,
    _plain_loop,
    global_batches,
    locate_first,
    prepared_model,
    rate_at,
)

RUN = Run(steps=16, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 5, "train_norms": True})
BF16 = replace(RUN, dtype="bf16")


def parts(losia: LoSiA) -> dict[str, Any]:
    """What save_checkpoint and load_checkpoint are given."""
    return {"model": losia.model, "optimizer": losia.state.optimizer, "losia": losia}


@contextmanager
def saving_without(monkeypatch: Any, kind: str, option: str) -> Iterator[None]:
    """Checkpoints are written as before this option of a kind of selection ("located", "drawn") was there."""
    now = LoSiAConfig.to_dict

    def earlier(config: LoSiAConfig) -> dict[str, Any]:
        values = now(config)
        del values["selection"][kind][option]
        return values

    with monkeypatch.context() as patched:
        patched.setattr(LoSiAConfig, "to_dict", earlier)
        yield


def start(engine: str, run: Run, *, other_weights: bool = False) -> tuple[LoSiA, Any, Callable[[], None]]:
    """A run before its first step; with `other_weights` neither weights nor subnets are those of the usual start."""
    model, config = prepared_model(run), LoSiAConfig(**run.config)
    if config.located is not None:  # whose draws are the seed's
        config.seed = 1 if other_weights else 0
    if other_weights:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.is_floating_point()):  # no codes
                parameter.add_(torch.randn_like(parameter) / 10)
    loop = _deepspeed_loop if engine.startswith("zero") else _plain_loop
    return loop(engine, model, config, run)


def train_on(losia: LoSiA, stepper: Any, run: Run, stop: int, after_step: Callable[[int], None] | None = None) -> list[float]:
    """Train from where the conductor stands to before step `stop`; losses averaged over the ranks."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    data, losses = global_batches(run), []
    for step in range(losia.steps, stop):
        mine = [{name: t.chunk(world)[rank] for name, t in batch.items()} for batch in data[step]]
        for group in stepper.groups:
            group["lr"] = rate_at(step, run.steps)
        losses.append(stepper(mine, None))
        if after_step is not None:
            after_step(step + 1)
    total = torch.tensor(losses, dtype=torch.float64)
    if world > 1 and losses:
        dist.all_reduce(total)
        total /= world
    return total.tolist()


def everything(losia: LoSiA) -> dict[str, Any]:
    """Weights, subnets, optimizer state and importance of this rank's rows, all copies."""
    losia.consolidate()
    model = unwrap(losia.model)
    found = {f"weight {n}": losia.parameters.read_whole(p).cpu() for n, p in model.named_parameters()}
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            found |= {f"state {name} {key}": t.cpu().clone() for key, t in losia.state.read_state(parameter).items()}
    for layer, accumulator in losia.accumulators.items():
        found |= {f"mean {layer.name}": accumulator.mean.clone(), f"deviation {layer.name}": accumulator.deviation.clone()}
    for layer in losia.sites:
        found |= {f"rows {layer.name}": layer.row_index.clone(), f"columns {layer.name}": layer.col_index.clone()}
    return found


def train_and_save(engine: str, run: Run, directory: Path | None, save_at: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """An undisturbed run that saves after some of its steps."""
    losia, stepper, close = start(engine, run)
    locate_first(losia, run)

    def after_step(done: int) -> None:
        if done in save_at:
            save_checkpoint(directory, **parts(losia), extra={"done": done}, **options)

    if 0 in save_at:
        after_step(0)
    losses = train_on(losia, stepper, run, run.steps, after_step)
    result = {"losses": losses, "everything": everything(losia)}
    close()
    return result


def resume(engine: str, run: Run, directory: Path, step: int | None) -> dict[str, Any]:
    """Another process's life after the checkpoint: a model with other weights, loaded, and trained to the end."""
    losia, stepper, close = start(engine, run, other_weights=True)
    extra = load_checkpoint(directory, **parts(losia), step=step)
    first = losia.steps
    losses = train_on(losia, stepper, run, run.steps)
    result = {
        "losses": losses,
        "everything": everything(losia),
        "first": first,
        "extra": extra,
        "rates": losia.learning_rates(),
    }
    close()
    return result


def assert_equal(result: dict[str, Any], expected: dict[str, Any], tolerance: float | None = None) -> None:
    """Losses from the resumed step on, and all tensors: bit for bit, or to a tolerance."""
    losses = expected["losses"][result["first"] :]
    ours, theirs = result["everything"], expected["everything"]
    if tolerance is None:
        assert result["losses"] == losses
        assert ours.keys() == theirs.keys()
        assert [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])] == []
        return
    assert max(abs(a - b) for a, b in zip(result["losses"], losses, strict=True)) <= tolerance
    for name, tensor in theirs.items():
        if name.startswith(("weight", "rows", "columns")) and not name.endswith("subnet"):
            difference = (tensor.double() - ours[name].double()).abs().max().item()
            assert difference <= (tolerance if name.startswith("weight") else 0), f"{name} differs by {difference:.2e}"
