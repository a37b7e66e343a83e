"""What the training loop asks of an engine: a plain PyTorch (or DDP) run, and a DeepSpeed run, with one surface."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from losia_dist.conductor import LoSiA


class PlainRun:
    """One process, or DDP over all ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        losia: LoSiA | None,
        *,
        accumulation: int,
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        self.wrapped, self.optimizer, self.scheduler, self.losia = model, optimizer, scheduler, losia
        self.accumulation, self.max_grad_norm, self.device = accumulation, max_grad_norm, device
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.grad_norm: Tensor | None = None
        self._trained = [p for p in model.parameters() if p.requires_grad]

    def train_step(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """One optimizer step over this rank's micro-batches; returns their mean loss (a tensor, not waited for)."""
        self.wrapped.train()
        total = torch.zeros((), device=self.device)
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            hold = isinstance(self.wrapped, DistributedDataParallel) and not last
            with self.wrapped.no_sync() if hold else contextlib.nullcontext():  # type: ignore[operator]
                loss = self.wrapped(**batch, use_cache=False).loss / len(batches)
                loss.backward()
            total += loss.detach()
        if self.max_grad_norm > 0:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self._trained, self.max_grad_norm)
        self.optimizer.step()
        if self.losia is not None:
            self.losia.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return total

    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the losses of a batch's target tokens; no collective in one process or DDP."""
        return self.model(**batch, use_cache=False, num_items_in_batch=1).loss


class DeepSpeedRun:
    """A DeepSpeed engine, which owns accumulation, clipping and the scheduler."""

    grad_norm: Tensor | None = None

    def __init__(self, engine: Any, losia: LoSiA | None) -> None:
        self.engine, self.losia, self.model = engine, losia, engine.module
        self.device = engine.device

    def train_step(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """As `PlainRun.train_step`; the engine counts micro-batches to the same accumulation boundary."""
        self.engine.train()
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.engine(**batch, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / len(batches)
        norm = self.engine.get_global_grad_norm()
        self.grad_norm = norm if norm is None or isinstance(norm, Tensor) else torch.tensor(norm)
        return total

    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """As `PlainRun.evaluate`; under ZeRO-3 every rank must call it equally often."""
        return self.engine(**batch, use_cache=False, num_items_in_batch=1).loss
