"""The oracle: LoSiA with dense tensors in one process, written from docs/algorithm.md line by line.

It imports nothing of the package and shares no code with it. Slow and plain on purpose.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.experts import ExpertInputs


class DenseLoSiA:
    """Trains subnets of an ordinary model whose weights are all dense.

    A subnet is one parameter S, with a key: the name of its weight for a linear layer, S [r, c] in one matrix [m, n]; a key of
    `experts` for experts, S [X, r, c] in as many matrices of one weight. Whatever speaks of a matrix is by (key, place in S).

    groups: keys of subnets per group, in localization order (decoder layers, parts of experts, output layer last).
    initial_subnets: key -> (rows [r] or [X, r], columns [c] or [X, c]); their sizes stay for the whole run.
    lr_schedule: learning rate at the 0-based optimizer step, rewarming not included.
    trainable_names: further parameters, trained densely by the same AdamW, never rewarmed or cleared, at full_lr_scale times
        the learning rate.
    localization_ranks: N for localization="rank_parallel": N times as many groups a slot, the i-th of them from the i-th of
        N equal parts of the data (modulo N); None: every group from all data.
    selection: "greedy", by the score; "random": drawn by seed, layer and step.
    share_columns: linear layers of one module with inputs of one width draw the same columns; by the score, those of them that
        read the same input get them together.
    outlier_limit: columns whose input is larger than this many medians, in the batches given to `locate`, are not drawn.
    experts: key of a subnet of experts -> (name of its weight, first expert, one past the last).
    transposed: names of weights whose matrices are stored as [n, m].
    importance_steps: k of the T steps of a slot whose importance is taken: those that end one of its k equal parts; None: all.
    rate_scales: of names in trainable_names, in place of full_lr_scale (routers).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[list[str]],
        initial_subnets: dict[str, tuple[Tensor, Tensor]],
        *,
        period: int,
        lr_schedule: Callable[[int], float],
        layers_per_slot: int = 1,
        importance: str = "param_mix",
        importance_betas: tuple[float, float] = (0.85, 0.85),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rewarm_steps: int | None = None,
        reset_bias_correction: bool = True,
        max_grad_norm: float | None = None,
        trainable_names: list[str] | tuple[str, ...] = (),
        localization_ranks: int | None = None,
        selection: str = "greedy",
        seed: int = 0,
        outlier_limit: float | None = None,
        full_lr_scale: float = 1.0,
        experts: Mapping[str, tuple[str, int, int]] | None = None,
        transposed: Collection[str] = (),
        rate_scales: Mapping[str, float] | None = None,
        importance_steps: int | None = None,
        share_columns: bool = False,
    ) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.groups = groups
        self.subnets = dict(initial_subnets)
        self.experts, self.transposed = dict(experts or {}), set(transposed)
        self.period = period
        self.lr_schedule = lr_schedule
        self.localization_ranks = localization_ranks
        self.selection, self.seed = selection, seed
        self.outlier_limit, self.share_columns = outlier_limit, share_columns
        self.drawable = {
            (key, place): torch.arange(matrix.shape[1]) for key in initial_subnets for place, matrix in self._matrices(key)
        }
        self.layers_per_slot = min(layers_per_slot * (localization_ranks or 1), len(groups))
        self.importance = importance
        self.importance_betas = importance_betas
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.rewarm_steps = period if rewarm_steps is None else rewarm_steps
        self.reset_bias_correction = reset_bias_correction
        self.max_grad_norm = max_grad_norm
        self.trainable_names = list(trainable_names)
        self.full_lr_scale = full_lr_scale
        self.rate_scales = dict(rate_scales or {})
        self.importance_steps = importance_steps

        self.t = 0
        self.group_of = {name: index for index, group in enumerate(groups) for name in group}
        self.relocalized_at: dict[int, int] = {}
        self.I_mean: dict[tuple[str, int], Tensor] = {}
        self.I_deviation: dict[tuple[str, int], Tensor] = {}
        self.adam: dict[str, dict[str, Any]] = {}
        for key, (rows, columns) in self.subnets.items():
            self.adam[key] = self._fresh_moments((*rows.shape, columns.shape[-1]))
        for name in self.trainable_names:
            self.adam[name] = self._fresh_moments(tuple(self.parameters[name].shape))
        self.inputs: dict[str, Tensor] = {}  # what each linear layer was called with, in the first forward pass
        self.losses: list[float] = []
        self.history: list[tuple[int, int, dict[str, tuple[Tensor, Tensor]]]] = []
        self.reached: dict[str, list[set[int]]] = {key: [] for key in self.subnets}  # places in S with a gradient, step by step

    def locate(self, micro_batches: list[dict[str, Tensor]]) -> None:
        """First subnets by the mean importance of these micro-batches, each with its own gradient; nothing is trained.

        With an outlier limit: drawn, from now on without the columns whose input stands out in these micro-batches.
        """
        if self.outlier_limit is not None:
            self._leave_outliers_out(micro_batches)
            for key in self.subnets:
                self.subnets[key] = self._draw(key, 0)
            return
        scores = {at: torch.zeros_like(matrix) for key in self.subnets for at, matrix in self._places(key)}
        for batch in micro_batches:
            _, gradient = self._mean_loss_and_gradient([batch])
            for key in self.subnets:
                for (at, w), (_, g) in zip(self._places(key), self._places(key, gradient), strict=True):
                    scores[at] += self._importance(w * g) / len(micro_batches)
        for group in self.groups:
            self.subnets |= self._select_group(group, scores)

    def step(self, micro_batches: list[dict[str, Tensor]]) -> float:
        """One optimizer step over the whole global batch, given as equally weighted micro-batches."""
        seen = self._gradients_for_importance(micro_batches)
        loss, gradient = self._mean_loss_and_gradient(micro_batches)
        t, T, L = self.t, self.period, len(self.groups)

        # Time slot: which groups accumulate importance.
        k = t // T
        localizing = [(k * self.layers_per_slot + i) % L for i in range(self.layers_per_slot)]

        # Importance, from the weight before the update and the gradient before clipping.
        for place, index in enumerate(localizing):
            for key in self.groups[index]:
                for (at, w), (_, g) in zip(self._places(key), self._places(key, seen[place % len(seen)]), strict=True):
                    if t % T == 0:
                        self.I_mean[at], self.I_deviation[at] = torch.zeros_like(w), torch.zeros_like(w)
                    if self.importance_steps is None or t % T in self._ends_of_parts():
                        self._average_importance(at, w, g)

        # Gradients that train, clipped by their global norm.
        trained = {key: self._take(key, gradient) for key in self.subnets}
        for key in self.subnets:
            self.reached[key].append({place for place, (_, g) in enumerate(self._places(key, gradient)) if g.any()})
        trained |= {name: gradient[name] for name in self.trainable_names}
        if self.max_grad_norm is not None:
            norm = torch.sqrt(sum((g**2).sum() for g in trained.values()))
            coefficient = min(1.0, self.max_grad_norm / (norm.item() + 1e-6))
            trained = {name: g * coefficient for name, g in trained.items()}

        # AdamW on the subnets (and on whatever else trains).
        with torch.no_grad():
            for name, g in trained.items():
                lr = self.lr_schedule(t) * self._ramp(name)
                if name in self.subnets:
                    self._put(name, self._adamw(name, self._take(name), g, lr))
                else:
                    weight = self.parameters[name]
                    weight.copy_(self._adamw(name, weight, g, lr))

        # End of the slot: new subnets, cleared moments, a new ramp.
        if (t + 1) % T == 0:
            for index in localizing:
                group = self.groups[index]
                if self.selection == "random":
                    chosen = {key: self._draw(key, self.t + 1) for key in group}
                else:
                    measured = [at for key in group for at, _ in self._places(key)]
                    chosen = self._select_group(group, {at: self.I_mean[at] * self.I_deviation[at] for at in measured})
                for key in group:
                    self.subnets[key] = chosen[key]
                    count = self.adam[key]["step"]
                    self.adam[key] = self._fresh_moments(tuple(self.adam[key]["m"].shape))
                    if not self.reset_bias_correction:
                        self.adam[key]["step"] = count
                self.relocalized_at[index] = t + 1
                self.history.append((t, index, chosen))

        self.t += 1
        self.losses.append(loss)
        return loss

    def _ends_of_parts(self) -> list[int]:
        """The slot's steps, from 0, in which one of its k parts ends: part i ends where i T / k steps are done."""
        k, T = self.importance_steps, self.period
        return [-(-i * T // k) - 1 for i in range(1, k + 1)]

    def _matrices(self, key: str, tensors: Mapping[str, Tensor] | None = None) -> list[tuple[int, Tensor]]:
        """(place in S, matrix [m, n]) of a subnet's weight, or of its gradient in `tensors`: views of what is stored."""
        name, first, last = self.experts.get(key, (key, 0, 0))
        stored = (tensors or self.parameters)[name].detach()
        found = list(stored[first:last]) if key in self.experts else [stored]
        return list(enumerate(matrix.t() if name in self.transposed else matrix for matrix in found))

    def _places(self, key: str, tensors: Mapping[str, Tensor] | None = None) -> list[tuple[tuple[str, int], Tensor]]:
        return [((key, place), matrix) for place, matrix in self._matrices(key, tensors)]

    def _rows_and_columns(self, key: str) -> list[tuple[Tensor, Tensor]]:
        """Of each matrix: int64 [r] and [c]."""
        rows, columns = self.subnets[key]
        return list(zip(rows, columns, strict=True)) if key in self.experts else [(rows, columns)]

    def _joined(self, key: str, found: list[Tensor]) -> Tensor:
        return torch.stack(found) if key in self.experts else found[0]

    def _take(self, key: str, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """What S holds of a weight, or of its gradient in `tensors`."""
        matrices = self._matrices(key, tensors)
        return self._joined(key, [matrices[i][1][r][:, c] for i, (r, c) in enumerate(self._rows_and_columns(key))])

    def _put(self, key: str, values: Tensor) -> None:
        per_matrix = list(values) if key in self.experts else [values]
        for (_, matrix), (r, c), value in zip(self._matrices(key), self._rows_and_columns(key), per_matrix, strict=True):
            matrix[r[:, None], c[None, :]] = value

    def _select_group(self, group: list[str], scores: dict[tuple[str, int], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        chosen = {}
        for layers in self._sharing(group):
            if len(layers) == 1:
                chosen[layers[0]] = self._select(layers[0], scores)
            elif any(scores[key, 0].any() for key in layers):
                found = select_together([scores[key, 0] for key in layers], [tuple(map(len, self.subnets[k])) for k in layers])
                for key, (rows, columns) in zip(layers, found, strict=True):
                    chosen[key] = (rows if scores[key, 0].any() else self.subnets[key][0], columns)
            else:
                chosen |= {key: self.subnets[key] for key in layers}
        return {key: chosen[key] for key in group}

    def _sharing(self, group: list[str]) -> list[list[str]]:
        """The layers of a group that have the same columns, each list at once; all others by themselves."""
        found: dict[Any, list[list[str]]] = {}
        for key in [key for key in self.inputs if key in group] if self.share_columns else []:
            module = key.removesuffix(".weight").split(".")[:-1]
            width, count = self._matrices(key)[0][1].shape[1], len(self.subnets[key][1])
            alike = found.setdefault((*module, width, count), [])
            if alike and count < width and torch.equal(self.inputs[alike[-1][-1]], self.inputs[key]):
                alike[-1].append(key)
            else:
                alike.append([key])
        shared = [sorted(layers, key=group.index) for alike in found.values() for layers in alike]
        return shared + [[key] for key in group if not any(key in layers for layers in shared)]

    def _select(self, key: str, scores: dict[tuple[str, int], Tensor]) -> tuple[Tensor, Tensor]:
        chosen = []
        for place, (rows, columns) in enumerate(self._rows_and_columns(key)):
            score = scores[key, place]
            chosen.append(select(score, len(rows), len(columns)) if score.any() else (rows, columns))
        return self._joined(key, [rows for rows, _ in chosen]), self._joined(key, [columns for _, columns in chosen])

    def _draw(self, key: str, steps: int) -> tuple[Tensor, Tensor]:
        name, first, _ = self.experts.get(key, (key, 0, 0))
        chosen = []
        for (place, matrix), (rows, columns) in zip(self._matrices(key), self._rows_and_columns(key), strict=True):
            layer = f"{name}.{first + place}" if key in self.experts else name.removesuffix(".weight")
            drawable = self.drawable[key, place]
            width = matrix.shape[1] if self.share_columns and key not in self.experts else None
            chosen.append(draw(layer, len(matrix), drawable, (len(rows), len(columns)), self.seed, steps, width))
        return self._joined(key, [rows for rows, _ in chosen]), self._joined(key, [columns for _, columns in chosen])

    def _leave_outliers_out(self, micro_batches: list[dict[str, Tensor]]) -> None:
        inputs: dict[tuple[str, int], list[Tensor]] = {at: [] for at in self.drawable}

        def keep(key: str) -> Any:
            return lambda module, given: inputs[key, 0].append(given[0].detach().reshape(-1, given[0].shape[-1]))

        linear = [key for key in self.subnets if key not in self.experts]
        handles = [self.model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(keep(n)) for n in linear]
        with ExpertInputs({name: self.parameters[name] for name, _, _ in self.experts.values()}) as seen:
            for batch in micro_batches:
                self.model(**batch)
        for handle in handles:
            handle.remove()
        for key, (name, first, last) in self.experts.items():
            for expert in range(first, last):
                inputs[key, expert - first] = seen.inputs.get((name, expert), [])
        for (key, place), calls in inputs.items():
            if not calls:
                continue
            size = torch.stack([x.double().pow(2).mean(0) for x in calls]).mean(0).sqrt()
            middle = size.sort().values[(len(size) - 1) // 2]
            if self.subnets[key][1].shape[-1] < len(size):
                kept = [j for j, r in enumerate(size.tolist()) if r <= self.outlier_limit * middle]
                self.drawable[key, place] = torch.tensor(kept)

    def _gradients_for_importance(self, micro_batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """For each rank that localizes by itself (one, if they do it together): the gradient it takes importance from."""
        N = self.localization_ranks or 1
        parts = [[{key: value.chunk(N)[i] for key, value in batch.items()} for batch in micro_batches] for i in range(N)]
        return [self._mean_loss_and_gradient(part)[1] for part in parts]

    def _average_importance(self, at: tuple[str, int], w: Tensor, g: Tensor) -> None:
        """Folds one matrix's importance into its averages; [m, n] each."""
        if not g.any():
            return
        importance = self._importance(w * g)
        b1, b2 = self.importance_betas
        self.I_mean[at] = b1 * self.I_mean[at] + (1 - b1) * importance
        deviation = (importance - self.I_mean[at]).abs()
        self.I_deviation[at] = b2 * self.I_deviation[at] + (1 - b2) * deviation

    def _importance(self, wg: Tensor) -> Tensor:
        if self.importance == "param_mix":
            return (wg - 0.5 * wg**2).abs()
        return wg.abs() if self.importance == "first_order" else wg**2

    def _mean_loss_and_gradient(self, micro_batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        total = 0.0
        for batch in micro_batches:
            handles = [] if self.inputs else [self._note_input(key) for key in self.subnets if key not in self.experts]
            loss = self.model(**batch).loss / len(micro_batches)
            for handle in handles:
                handle.remove()
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}

    def _note_input(self, key: str) -> Any:
        layer = self.model.get_submodule(key.removesuffix(".weight"))
        return layer.register_forward_pre_hook(lambda _, given: self.inputs.update({key: given[0].detach().clone()}))

    def _ramp(self, name: str) -> float:
        if name in self.trainable_names:
            return self.rate_scales.get(name, self.full_lr_scale)
        if name not in self.group_of or self.group_of[name] not in self.relocalized_at or self.rewarm_steps == 0:
            return 1.0
        j = self.t - self.relocalized_at[self.group_of[name]]
        return min(1.0, (j + 1) / self.rewarm_steps)

    def _fresh_moments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"step": 0, "m": torch.zeros(shape), "v": torch.zeros(shape)}

    def _adamw(self, name: str, value: Tensor, g: Tensor, lr: float) -> Tensor:
        state = self.adam[name]
        b1, b2 = self.betas
        state["step"] += 1
        state["m"] = b1 * state["m"] + (1 - b1) * g
        state["v"] = b2 * state["v"] + (1 - b2) * g * g
        m_hat = state["m"] / (1 - b1 ** state["step"])
        v_hat = state["v"] / (1 - b2 ** state["step"])
        return value * (1 - lr * self.weight_decay) - lr * m_hat / (v_hat.sqrt() + self.eps)


class DenseWithOptimizer(DenseLoSiA):
    """The same, trained by an optimizer of torch instead of AdamW: a new one for each subnet that begins anew.

    optimizer: its class.
    """

    def __init__(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.optimizer = optimizer
        super().__init__(*args, **kwargs)

    def _adamw(self, name: str, value: Tensor, g: Tensor, lr: float) -> Tensor:
        state = self.adam[name]
        if "optimizer" not in state:
            state["value"] = nn.Parameter(value.clone())
            state["optimizer"] = self.optimizer([state["value"]], lr=lr)
        state["optimizer"].param_groups[0]["lr"] = lr
        state["value"].data.copy_(value)
        state["value"].grad = g.clone()
        state["optimizer"].step()
        return state["value"].detach().clone()


def select_together(scores: list[Tensor], sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Rows of each layer and the columns of all of them: the better of two candidates by the sum of all scores inside.

    scores: [m, n] of each layer, of one n. sizes: (r, c) of each, of one c.
    """
    doubles, count = [score.double() for score in scores], sizes[0][1]

    def top(values: Tensor, count: int) -> Tensor:
        return torch.sort(values, descending=True, stable=True).indices[:count].sort().values

    rows = [top(s.sum(1), r) for s, (r, _) in zip(doubles, sizes, strict=True)]
    columns = top(sum(s[own].sum(0) for s, own in zip(doubles, rows, strict=True)), count)
    rows_first = [(own, columns) for own in rows]
    columns = top(sum(s.sum(0) for s in doubles), count)
    columns_first = [(top(s[:, columns].sum(1), r), columns) for s, (r, _) in zip(doubles, sizes, strict=True)]

    def inside(candidate: list[tuple[Tensor, Tensor]]) -> float:
        return sum(s[r][:, c].sum().item() for s, (r, c) in zip(doubles, candidate, strict=True))

    return columns_first if inside(columns_first) > inside(rows_first) else rows_first


def select(score: Tensor, row_count: int, column_count: int) -> tuple[Tensor, Tensor]:
    """The published greedy: best of three candidates by the sum of the score over R x C; ties to the lower index."""
    s = score.double()

    def top(values: Tensor, count: int) -> Tensor:
        return torch.sort(values, descending=True, stable=True).indices[:count].sort().values

    independent_rows, independent_columns = top(s.sum(1), row_count), top(s.sum(0), column_count)
    candidates = [
        (independent_rows, independent_columns),
        (independent_rows, top(s[independent_rows].sum(0), column_count)),
        (top(s[:, independent_columns].sum(1), row_count), independent_columns),
    ]
    best, best_sum = candidates[0], -1.0
    for rows, columns in candidates:
        objective = s[rows][:, columns].sum().item()
        if objective > best_sum:
            best, best_sum = (rows, columns), objective
    return best


def draw(
    layer: str,
    rows: int,
    drawable: Tensor,
    size: tuple[int, int],
    seed: int,
    steps: int = 0,
    shared_width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The subnet that a layer (or `name.e`, an expert) of so many rows gets after so many steps: int64 [r] and [c], sorted.

    drawable: the columns that may be drawn, ascending. size: (r, c). shared_width: n of a linear layer that shares its columns
    with others of its module; None: its columns are its own.
    """
    key = f"{seed}/{layer}" + (f"/{steps}" if steps else "")
    generator = torch.Generator()
    generator.manual_seed(binascii.crc32(key.encode()))
    shuffled_rows = torch.randperm(rows, generator=generator)
    if shared_width is not None:
        key = f"{seed}/{'.'.join(layer.split('.')[:-1])}/columns of {shared_width}" + (f"/{steps}" if steps else "")
        generator.manual_seed(binascii.crc32(key.encode()))
    shuffled_columns = torch.randperm(len(drawable), generator=generator)
    return shuffled_rows[: size[0]].sort().values, drawable[shuffled_columns[: size[1]].sort().values]
