"""What the training loop asks of an engine: plain PyTorch (one process, DDP, FSDP2), or DeepSpeed, with one surface."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from losia_dist.data import count_targets
from losia_dist.data.sequence import split_sequence
from losia_dist.loss.sequence_loss import sum_over_sequence
from losia_dist.run.conductor import LoSiA
from losia_dist.sharding.sequence_parallel import SequenceRanks

Batch = dict[str, Tensor]


class Engine:
    """A model that trains. Every method is called by all ranks, in the same order.

    Attributes:
        name: for people. model: without wrappers. device: where it computes.
        losia: its conductor; None in full fine-tuning.
        grad_norm: of the latest step, before clipping.
        is_sharded: forward passes communicate, so that all ranks must make equally many.
        sequence_ranks: ranks that compute each sequence together, from the same batches.
    """

    grad_norm: Tensor | None = None
    sequence_ranks = 1

    def __init__(
        self, name: str, wrapped: Any, model: Any, optimizer: Any, scheduler: Any, losia: LoSiA | None, device: torch.device
    ) -> None:
        self.name, self.wrapped, self.model, self.device = name, wrapped, model, device
        self.optimizer, self.scheduler, self.losia = optimizer, scheduler, losia
        self.is_sharded = False

    def train_step(self, batches: list[Batch]) -> Tensor:
        """One optimizer step over this rank's micro-batches (on the CPU), for the mean loss over all target tokens of the
        global batch. Returns this rank's share: the mean over the ranks is that loss. Nothing is waited for."""
        raise NotImplementedError

    def evaluate(self, batch: Batch) -> Tensor:
        """Sum of the losses of the target tokens of a batch (on the CPU)."""
        model = self.model if isinstance(self.wrapped, DistributedDataParallel) else self.wrapped
        return model(**_on(batch, self.device), use_cache=False, num_items_in_batch=1).loss

    def calibration_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch (on the device), for locating subnets; the model is unwrapped from DDP."""
        loss: Tensor = model(**batch, use_cache=False, num_items_in_batch=max(1, count_targets(batch))).loss
        return loss

    def whole_sequences(self) -> contextlib.AbstractContextManager[None]:
        """In here the model computes sequences of each rank's own, as for generating."""
        return contextlib.nullcontext()

    def learning_rate(self) -> float:
        """The scheduled learning rate (rewarming of single groups not included)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def checkpoint_parts(self) -> dict[str, Any]:
        """What `save_checkpoint` and `load_checkpoint` take, with LoSiA."""
        return {"model": self.wrapped, "optimizer": self.optimizer, "losia": self.losia, "scheduler": self.scheduler}


class PlainRun(Engine):
    """One process, DDP over all ranks, or a model that `fully_shard` was applied to. max_grad_norm: 0 clips nothing."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        losia: LoSiA | None,
        *,
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        super().__init__(name, model, plain, optimizer, scheduler, losia, device)
        self.max_grad_norm = max_grad_norm
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.is_sharded = any(hasattr(p, "placements") for p in self._trained)

    def train_step(self, batches: list[Batch]) -> Tensor:
        self.wrapped.train()
        total = torch.zeros((), device=self.device)
        targets = _targets_per_part(batches, self.device)
        for place, batch in enumerate(batches):
            hold = isinstance(self.wrapped, DistributedDataParallel) and place < len(batches) - 1
            with self.wrapped.no_sync() if hold else contextlib.nullcontext():
                batch = _on(batch, self.device)
                loss = self.wrapped(**batch, use_cache=False, num_items_in_batch=targets).loss / len(batches)
                loss.backward()
            total += loss.detach()
        if self.max_grad_norm > 0:
            norm: Any = torch.nn.utils.clip_grad_norm_(self._trained, self.max_grad_norm)
            self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        if self.losia is not None:
            self.losia.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return total


class DeepSpeedRun(Engine):
    """A DeepSpeed engine, which owns accumulation, clipping and the scheduler."""

    def __init__(self, engine: Any, losia: LoSiA | None) -> None:
        stage = engine.zero_optimization_stage()
        parts = (engine, engine.module, engine.optimizer, engine.lr_scheduler, losia, engine.device)
        super().__init__(f"deepspeed-zero{stage}", *parts)
        self.is_sharded = stage == 3
        self._sequence = SequenceRanks() if losia is None else losia.sequence
        self.sequence_ranks = self._sequence.size
        if self.sequence_ranks > 1:
            self.name += f", {self.sequence_ranks} ranks a sequence"

    def train_step(self, batches: list[Batch]) -> Tensor:
        self.wrapped.train()
        total = torch.zeros((), device=self.device)
        targets = _targets_per_part(batches, self.device)
        for batch in batches:
            part = self.wrapped(**_on(self._part(batch), self.device), use_cache=False, num_items_in_batch=targets).loss
            loss = sum_over_sequence(part, self._sequence.group)
            self.wrapped.backward(loss)  # divides by the number of micro-batches
            self.wrapped.step()
            total += loss.detach() / len(batches)
        norm = self.wrapped.get_global_grad_norm()
        self.grad_norm = norm if norm is None or isinstance(norm, Tensor) else torch.tensor(norm)
        return total

    def evaluate(self, batch: Batch) -> Tensor:
        """Sum of the losses of this rank's part of a batch."""
        return super().evaluate(self._part(batch))

    def calibration_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        targets = max(1, count_targets(batch))
        part: Tensor = model(**self._part(batch), use_cache=False, num_items_in_batch=targets).loss
        return sum_over_sequence(part, self._sequence.group)

    def whole_sequences(self) -> contextlib.AbstractContextManager[None]:
        if self.sequence_ranks == 1:
            return contextlib.nullcontext()
        from losia_dist.integrations.deepspeed.ulysses import whole_sequences

        return whole_sequences(self.model)

    def _part(self, batch: Batch) -> Batch:
        """This rank's part of its group's sequences. What fills them up counts for nothing."""
        if self.sequence_ranks == 1:
            return batch
        place = dist.get_rank(self._sequence.group)
        return split_sequence(batch, rank=place, size=self.sequence_ranks, pad_token_id=0)


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _targets_per_part(batches: list[Batch], device: torch.device) -> Tensor:
    """Target tokens of the global batch over its parts (micro-batches of all ranks), a float32 scalar. Ranks that compute
    sequences together each count all of them, and are as many parts: which comes to the same.

    Engines average the gradient over the parts. With each part's summed loss divided by this, that average is the gradient
    of the mean over all tokens, however unevenly the tokens fall on the parts.
    """
    count = torch.tensor(float(sum(count_targets(batch) for batch in batches)), device=device)
    parts = len(batches)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        parts *= dist.get_world_size()
    return count / parts
