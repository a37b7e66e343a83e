"""One LoSiA run whose ranks share each sequence, and the same run on the dense reference. Functions here run on the pool."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from losia_dist import LoSiAConfig, get_losia_model, initialize, sequence_loss, split_sequence
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.integrations.deepspeed.tiled_mlp import use_tiled_mlp
from losia_dist.loss.sequence_loss import sum_over_sequence
from tests.reference.dense import DenseLoSiA
from tests.support.expected import converted_targets
from tests.support.models import tiny_llama
from tests.support.training import RATE, dense_settings, rate_at, weight_key

VOCABULARY, IGNORED = 96, -100


@dataclass(frozen=True)
class Run:
    """What is trained, and on what. A micro-batch is `batch` sequences over all groups of ranks."""

    steps: int = 20
    batch: int = 4
    length: int = 12
    accumulation: int = 1
    max_grad_norm: float = 0.0
    checkpointing: bool = False
    packed: bool = False  # two records in each row, which must not see each other
    model: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=lambda: {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 5})
    deepspeed: dict[str, Any] = field(default_factory=dict)
    tiles: int = 0  # parts that MLPs compute a micro-batch in
    calibration: int = 0  # micro-batches of 2 sequences that the first subnets are located from


def build(run: Run) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 36, "head_dim": 10}
    return tiny_llama(**{**heads, "attn_implementation": "sdpa", "max_position_embeddings": 64, **run.model})


def masked_batches(run: Run, steps: int, micro_batches: int, batch: int, seed: int) -> list[list[dict[str, torch.Tensor]]]:
    """Sequences whose prompts are of unlike length, some longer than a rank's part, and without loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(steps):
        made.append([])
        for _ in range(micro_batches):
            ids = torch.randint(0, VOCABULARY, (batch, run.length), generator=generator)
            labels = ids.clone()
            prompts = torch.randint(1, run.length - 2, (batch,), generator=generator)
            prompts[0] = run.length - 3  # nothing but prompt on the first ranks
            labels[torch.arange(run.length)[None] < prompts[:, None]] = IGNORED
            one = {"input_ids": ids, "labels": labels}
            if run.packed:
                half = run.length // 2 - 1
                positions = torch.cat([torch.arange(half), torch.arange(run.length - half)])
                labels[:, half] = IGNORED
                one["position_ids"] = positions[None].expand(batch, -1)
            made[-1].append(one)
    return made


def train_batches(run: Run) -> list[list[dict[str, torch.Tensor]]]:
    return masked_batches(run, run.steps, run.accumulation, run.batch, seed=7)


def calibration_batches(run: Run) -> list[dict[str, torch.Tensor]]:
    return [step[0] for step in masked_batches(run, run.calibration, 1, 2, seed=11)]


class _Reference(DenseLoSiA):
    """The loss of a micro-batch is over all of its target tokens."""

    norms: list[float]

    def _gradients_for_importance(self, micro_batches: Any) -> Any:
        if self.localization_ranks in (None, 1):
            return [self._mean_loss_and_gradient(micro_batches)[1]]
        N = self.localization_ranks
        targets = [(batch["labels"][:, 1:] != IGNORED).sum() / N for batch in micro_batches]
        found = []
        for i in range(N):
            parts = [{key: value.chunk(N)[i] for key, value in batch.items()} for batch in micro_batches]
            for part, count in zip(parts, targets, strict=True):
                part["num_items_in_batch"] = count
            found.append(self._mean_loss_and_gradient(parts)[1])
        return found


def reference(run: Run, owners: int = 1) -> dict[str, Any]:
    """Losses, whole weights, selections and gradient norms of one process. owners: groups that localize by themselves."""
    config, model = LoSiAConfig(**run.config), build(run)
    model.config.use_cache = False
    targets = converted_targets(build(run), config)
    dense = _Reference(
        model,
        list(targets.groups.values()),
        targets.subnets,
        **dense_settings(run, config, targets, owners),
    )
    if run.calibration:
        dense.locate(calibration_batches(run))
    first = dict(dense.subnets)
    norms, losses = [], []
    for micro_batches in train_batches(run):
        norms.append(_norm(dense, micro_batches))
        losses.append(dense.step(micro_batches))
    weights = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    return {"losses": losses, "weights": weights, "history": dense.history, "first": first, "norms": norms}


def _norm(dense: Any, micro_batches: Any) -> float:
    _, gradient = dense._mean_loss_and_gradient(micro_batches)
    trained = [dense._take(key, gradient) for key in dense.subnets] + [gradient[name] for name in dense.trainable_names]
    return float(sum((g.double() ** 2).sum() for g in trained) ** 0.5)


def begin(run: Run, stage: int, size: int, **arguments: Any) -> Any:
    """A DeepSpeed engine whose ranks share sequences, `size` each; called by all ranks."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    groups = dist.get_world_size() // size
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 100_000}
    for limit in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
        zero[f"stage3_{limit}"] = 0
    settings = {
        "train_micro_batch_size_per_gpu": run.batch // groups,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": run.max_grad_norm,
        "sequence_parallel_size": size,
        **run.deepspeed,
        "zero_optimization": {**zero, **run.deepspeed.get("zero_optimization", {})},
    }
    model = build(run)
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.tiles:
        use_tiled_mlp(get_losia_model(model, LoSiAConfig(**run.config)), run.tiles)
    engine, *_ = initialize(model=model.train(), losia_config=LoSiAConfig(**run.config), config=settings, lr=RATE, **arguments)
    return engine


def end(engine: Any) -> None:
    from losia_dist.integrations.deepspeed.ulysses import forget_sequences

    engine.losia.detach()
    engine.destroy()
    forget_sequences()


def place(size: int) -> tuple[int, int, int]:
    """(groups, this rank's group, this rank's place in it)."""
    return dist.get_world_size() // size, dist.get_rank() // size, dist.get_rank() % size


def parts(batches: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of each micro-batch."""
    groups, group, rank = place(size)
    mine = [{name: value.chunk(groups)[group] for name, value in batch.items()} for batch in batches]
    return [split_sequence(batch, rank=rank, size=size) for batch in mine]


def weighted_loss(engine: Any, part: dict[str, torch.Tensor], targets: Any) -> torch.Tensor:
    """The loss over `targets` tokens: what the training script does."""
    loss = engine(**part, use_cache=False, num_items_in_batch=targets).loss
    return sum_over_sequence(loss, engine.losia.sequence.group)


def mean_loss(model: Any, part: dict[str, torch.Tensor], group: Any) -> torch.Tensor:
    """The mean loss of a group's sequences, from each rank's own mean."""
    return sequence_loss(model(**part, use_cache=False).loss, part["shift_labels"], group)


def train(run: Run, stage: int, size: int, inspect: Any = None, **arguments: Any) -> dict[str, Any]:
    """The run on an engine; called by all ranks. Keys as `reference`'s, on every rank."""
    engine = begin(run, stage, size, **arguments)
    losia, groups = engine.losia, place(size)[0]
    if run.calibration:
        _, group, _ = place(size)
        mine = calibration_batches(run)[group::groups]
        mine = [split_sequence(batch, rank=place(size)[2], size=size) for batch in mine]
        losia.locate(mine, lambda model, batch: mean_loss(model, batch, losia.sequence.group))
    first = {weight_key(site): (site.row_index.clone(), site.col_index.clone()) for site in losia.sites}
    losses, history, norms = [], [], []
    for step, micro_batches in enumerate(train_batches(run)):
        localizing, total = losia.localizing, 0.0
        for group in engine.optimizer.param_groups:
            group["lr"] = rate_at(step, run.steps)
        for batch, part in zip(micro_batches, parts(micro_batches, size), strict=True):
            targets = (batch["labels"][:, 1:] != IGNORED).sum() / groups
            loss = weighted_loss(engine, part, targets)
            engine.backward(loss)
            engine.step()
            total += loss.item() / len(micro_batches)
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
        if inspect:
            inspect(engine, step)
        losses.append(total)
        if (step + 1) % losia.config.period == 0:
            for name in localizing:
                sites = [site for site in losia.sites if site.group_name == name]
                history.append((step, name, {weight_key(s): (s.row_index.clone(), s.col_index.clone()) for s in sites}))
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    losia.consolidate()
    named = unwrap(losia.model).named_parameters(remove_duplicate=False)
    weights = {n: losia.parameters.read_whole(p).float() for n, p in named}
    weights = {n: w for n, w in weights.items() if not re.search(r"[._]subnet(_\d+)?$", n)}
    end(engine)
    losses = (mean / dist.get_world_size()).tolist()
    return {"losses": losses, "weights": weights, "history": history, "first": first, "norms": norms}
