"""The training loop: steps, held-out losses, logs, and the summary."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from losia_dist.errors import DivergenceError
from losia_dist.ranks.interruption import Interrupted, Interruption
from losia_dist.recipe.checkpoints import Checkpoints
from losia_dist.recipe.engines import Engine
from losia_dist.recipe.heldout import held_out_loss, sample_answers
from losia_dist.recipe.logs import RunLog
from losia_dist.recipe.trajectory import Progress
from losia_dist.run.memory_kinds import write_memory
from losia_dist.run.run_facts import GB, peak_memory


class Reporter:
    """Held-out losses and sample answers of a run, into its log and its summary. Used by all ranks alike."""

    def __init__(self, run: Engine, log: RunLog, summary: dict[str, Any], options: argparse.Namespace) -> None:
        self.run, self.log, self.summary, self.options = run, log, summary, options
        self.loader: Any | None = None
        self.held_out: Any | None = None
        self.tokenizer: Any = None

    def hold_out(self, loader: Any, held_out: Any, tokenizer: Any) -> None:
        """From here on report on this data; without it there is no report."""
        self.loader, self.held_out, self.tokenizer = loader, held_out, tokenizer

    def loss(self, step: int, key: str | None = None) -> None:
        """Measure the held-out loss after `step` steps; keep it in the summary under `key`."""
        if self.loader is None:
            return
        value = held_out_loss(self.run, self.loader)
        self.log.record(step, held_out=value)
        if key is not None:
            self.summary[key] = value

    def samples(self, key: str) -> None:
        """Answer the first held-out prompts; keep the answers in the summary under `key`."""
        answers: list[dict[str, str]] = []
        if self.held_out is not None and self.options.samples:
            answers = sample_answers(self.run, self.held_out, self.tokenizer, self.options.samples, self.options.sample_tokens)
        self.summary[key] = answers
        for answer in answers:
            self.log.say(f"\nprompt: {answer['prompt']}\n\n{key.removeprefix('samples_')} training: {answer['answer']}\n")


def train_steps(
    run: Engine,
    options: argparse.Namespace,
    steps: int,
    loader: DataLoader[dict[str, Tensor]],
    reporter: Reporter,
    checkpoints: Checkpoints,
    begun: Progress,
) -> None:
    """Train until `steps` optimizer steps are done, from `begun`, where the engine stands. Called by all ranks.

    Raises:
        DivergenceError: the loss of a logged or saved stretch is not finite (on every rank).
        CheckpointError: a save failed (on every rank).
        Interrupted: SIGTERM came, and a checkpoint has been saved (on every rank).
    """
    log, summary = reporter.log, reporter.summary
    batches = _endless(loader, begun.step * options.gradient_accumulation)
    seconds, tokens, logged = begun.seconds, begun.tokens, begun.logged
    loss_sum = torch.full((), begun.loss_sum, device=run.device)
    interruption, is_first = Interruption(checkpoints.saves, options.timeout), True
    with interruption.watched():
        for step in range(begun.step + 1, steps + 1):
            began = time.perf_counter()
            interruption.begin_step()
            micro_batches = list(itertools.islice(batches, options.gradient_accumulation))
            localizing = run.losia.localizing if run.losia is not None and run.losia.config.located is not None else None
            rate = run.learning_rate()
            loss_sum += run.train_step(micro_batches)
            tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * _world_size() // run.sequence_ranks
            values: dict[str, Any] = {}
            if step % options.logging_steps == 0 or step == steps:
                # Here, and where a checkpoint is saved, the host waits for the device; nowhere else.
                values = {"loss": _over_ranks(loss_sum) / (step - logged), "lr": rate}
                loss_sum.zero_()
                logged = step
            seconds += time.perf_counter() - began
            if values:
                values["tokens_per_second"] = tokens / seconds
                if run.grad_norm is not None:
                    values["grad_norm"] = float(run.grad_norm)
                values["peak_memory_gb"] = _largest_over_ranks(peak_memory(run.device), run.device) / GB
                if run.losia is not None:
                    values["learning_rates"] = run.losia.learning_rates()
                    values |= run.losia.expert_load.read()
                if localizing is not None:
                    values["localizing"] = localizing[0] if len(localizing) == 1 else f"{localizing[0]} .. {localizing[-1]}"
                summary["train_loss"] = values["loss"]
                _check_finite(values["loss"], step)
            log.advance(step, **values)
            if values and log.enabled and (step == steps or is_first):
                is_first = False
                accumulators = run.losia.accumulators.values() if run.losia is not None else ()
                write_memory(log.directory, step, run.model, run.optimizer, accumulators, run.device)
            if options.eval_steps and step % options.eval_steps == 0 and step < steps:
                reporter.loss(step)
            stops = interruption.end_step()
            if stops or checkpoints.are_due(step, steps):
                pending = _over_ranks(loss_sum)
                _check_finite(pending, step)  # what has diverged must not replace a checkpoint that has not
                reached = Progress(step, logged, pending, seconds, log.elapsed(), tokens)
                saved = checkpoints.save(run, reached, summary)
                if stops and step < steps:
                    checkpoints.wait(run)
                    raise Interrupted(f"SIGTERM after step {step} of {steps}: saved {saved}. Go on from it with --resume.")
    summary |= {"training_seconds": round(seconds, 2), "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _over_ranks(value: Tensor) -> float:
    """The mean of a scalar over the ranks. Called by all of them; waits for the device."""
    mean = value.detach().clone()
    if _world_size() > 1:
        dist.all_reduce(mean)
        mean /= _world_size()
    return mean.item()


def _largest_over_ranks(value: int, device: torch.device) -> int:
    """Called by all ranks; waits for the device."""
    if _world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergenceError(
            f"the training loss is {loss} at step {step}: the run has diverged. Lower --learning_rate or --max_grad_norm, or "
            "train in fp32 to see whether the dtype is to blame."
        )


def _endless(loader: Any, done: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one epoch after the other, without the first `done`, of which no example is read."""
    first, done = divmod(done, len(loader))
    for epoch in itertools.count(first):
        loader.sampler.set_epoch(epoch)
        if done:
            rest = list(itertools.islice(loader.batch_sampler, done, None))
            yield from DataLoader(loader.dataset, batch_sampler=rest, collate_fn=loader.collate_fn, generator=loader.generator)
            done = 0
        else:
            yield from loader
