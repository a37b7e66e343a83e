"""One run: a copy of the start is trained by one method and measured. One process, a plain PyTorch loop."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.quality.answers import write_answers
from benchmarks.quality.batches import HELD_OUT, TRAINED, encode, encode_text, evaluation_batches, training_batches
from benchmarks.quality.loss import answer_loss, autocast, mean_loss
from benchmarks.quality.methods import METHODS, Start, Trained
from benchmarks.quality.setting import Setting
from benchmarks.quality.tasks import Task, load_task, unrelated_texts

WARMUP, FLOOR, CLIP = 0.1, 0.1, 1.0  # share of the steps; share of the peak rate at the end; most norm of a gradient


class TaskData:
    """A task's examples and batches for one tokenizer, and what the untouched model makes of them."""

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self.task = task
        self.train = encode(task.train, tokenizer, TRAINED)
        self.held_out = encode(task.held_out, tokenizer, HELD_OUT)
        if len(self.held_out) != len(task.held_out):
            raise SystemExit(f"{task.name}: held-out records are longer than the benchmark's limit; give shorter ones.")
        self.batches = {
            "choice": evaluation_batches(encode(task.choice, tokenizer, HELD_OUT)),
            "held_out": evaluation_batches(self.held_out),
        }
        self.before: dict[str, float] = {}
        self.score_before: dict[int, float] = {}  # by number of problems


class Bench:
    """The start of all runs: a model, its tokenizer and the tasks' data, each read once.

    Args:
        model: a causal language model of Transformers on the CPU, in fp32. It is never changed.
        tokenizer: its tokenizer.
        data: directory of the quickstart's data.
        precision: of the arithmetic in every run and evaluation, one of `loss.PRECISIONS`.
    """

    def __init__(self, model: Any, tokenizer: Any, data: Path = Path("quickstart"), precision: str = "bf16") -> None:
        self.model, self.tokenizer, self.data_directory = model.eval(), tokenizer, data
        self.precision = precision
        self._data: dict[str, TaskData] = {}

    @classmethod
    def load(cls, directory: str, data: Path, precision: str) -> Bench:
        """Read a model's directory.

        Raises:
            SystemExit: it is not there.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not Path(directory, "config.json").is_file():
            raise SystemExit(f"{directory} holds no model: python launch/prepare_quickstart.py --output {data}")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(directory), data, precision)

    def data(self, name: str) -> TaskData:
        """A task's data, encoded when it is first asked for."""
        if name not in self._data:
            self._data[name] = TaskData(load_task(name, self.data_directory), self.tokenizer)
        return self._data[name]

    @cached_property
    def unrelated(self) -> list[Any]:
        """Batches of text that no task trains on."""
        return evaluation_batches(encode_text(unrelated_texts(), self.tokenizer))

    def fresh(self) -> Any:
        """A copy of the untouched model."""
        return copy.deepcopy(self.model)

    def losses(self, model: Any, data: TaskData) -> dict[str, float]:
        """Mean loss per token on the problems of the choice, on the held-out ones and on unrelated text."""
        measured = [*data.batches.items(), ("unrelated", self.unrelated)]
        return {name: mean_loss(model, batches, self.precision) for name, batches in measured}

    def before(self, data: TaskData) -> dict[str, float]:
        """What `losses` gives for the untouched model; measured once."""
        if not data.before:
            data.before = self.losses(self.model, data)
        return data.before

    def score(self, model: Any, data: TaskData, count: int) -> float | None:
        """Mean score of the answers to the first `count` held-out problems, or None. Casts the model to bf16."""
        if not count or data.task.score is None:
            return None
        examples = data.held_out[:count]
        answers = write_answers(model, self.tokenizer, examples, data.task.answer_tokens)
        return statistics.fmean(data.task.score(answer, index) for index, answer in enumerate(answers))

    def score_before(self, data: TaskData, count: int) -> float | None:
        """What `score` gives for the untouched model; measured once."""
        if count not in data.score_before:
            score = self.score(self.fresh() if count else None, data, count)
            if score is None:
                return None
            data.score_before[count] = score
        return data.score_before[count]


@dataclass
class Fit:
    """A finished training: what was trained, each step's loss and seconds, and what it took."""

    trained: Trained
    losses: list[float]
    seconds: list[float]
    seconds_of_preparation: float
    peak_bytes: int


def fit(model: Any, untouched: Callable[[], Any], data: TaskData, setting: Setting) -> Fit:
    """Train `model` on a task's data by the setting's method. The data's order depends on the setting's seed alone."""
    method = METHODS[setting.method]
    gc.collect()
    torch.manual_seed(setting.seed)
    batches = training_batches(data.train, setting.batch or data.task.batch, setting.steps, setting.seed)
    reset_peak("cpu")
    began = time.perf_counter()
    start = Start(model.train(), untouched, batches, setting.rate, setting.seed, setting.steps, setting.precision)
    trained = method.build(start, **method.options(setting.options))
    prepared = time.perf_counter() - began
    losses, seconds = train(trained, batches, setting.precision)
    return Fit(trained, losses, seconds, prepared, peak_bytes("cpu"))


def run(bench: Bench, setting: Setting) -> dict[str, Any]:
    """Train and measure. The result holds plain values; losses in nats per token, None where they are not finite."""
    data = bench.data(setting.task)
    before, score_before = bench.before(data), bench.score_before(data, setting.scored)
    done = fit(bench.fresh(), bench.fresh, data, setting)
    after = bench.losses(done.trained.model, data)
    result = {
        "before": before,
        "after": after,
        "gain": before["held_out"] - after["held_out"],
        "forgetting": after["unrelated"] - before["unrelated"],
        "score_before": score_before,
        "score": None,
        "training_losses": done.losses,
        "seconds_per_step": statistics.median(done.seconds[1:] or done.seconds),
        "seconds_of_steps": sum(done.seconds),
        "seconds_of_preparation": done.seconds_of_preparation,
        "peak_bytes": done.peak_bytes,
        "trained_parameters": sum(parameter.numel() for parameter in done.trained.parameters),
        **done.trained.details,
    }
    if setting.scored and data.task.score is not None:  # last, since it uses the model up
        result["score"] = bench.score(done.trained.plain(), data, setting.scored)
    return finite(result)


def train(trained: Trained, batches: list[Any], precision: str = "bf16") -> tuple[list[float], list[float]]:
    """The loop: one step a batch. Returns each step's loss and seconds."""
    optimizer, parameters, steps = trained.optimizer, trained.parameters, len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    losses: list[float] = []
    seconds: list[float] = []
    for batch in batches:
        began = time.perf_counter()
        with autocast(precision):
            loss = answer_loss(trained.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        scheduler.step()
        trained.after_step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 5))
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate in step `step` (from 0) of `steps`: linear warm-up, then a cosine to a tenth."""
    warmup = round(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def finite(value: Any) -> Any:
    """Plain JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
