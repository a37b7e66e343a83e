"""Where what the documentation shows can run: the files it names, and the objects its Python blocks take for given."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, LoSiATrainer, get_losia_model, initialize, losia_parameter_groups
from tests.support.documents import ROOT
from tests.support.models import batches
from tests.support.trl_models import conversations, preferences, save_tiny_model

FOLDERS = ("launch", "configs", "examples", "benchmarks", "tests", "docs")


def make_place(directory: Path, logs: bool = False) -> Path:
    """A directory with MODEL, BASE and M (one tiny model), MODEL_WITH_EXPERTS, train.jsonl and F, pairs.jsonl, the repository's
    folders.

    logs: with the logs of three short runs, runs/first, runs/second and runs/full.
    """
    model = directory / "MODEL"
    save_tiny_model(model, max_position_embeddings=2048, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 97, "hidden_size": 64}
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "MODEL_WITH_EXPERTS")
    (directory / "shared").mkdir()
    for name in ("M", "BASE", "base", "shared/model"):
        (directory / name).symlink_to(model, target_is_directory=True)
    for name in FOLDERS:
        (directory / name).symlink_to(ROOT / name, target_is_directory=True)
    for name, records in (("train.jsonl", conversations(16)), ("pairs.jsonl", preferences(16))):
        (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (directory / "F").symlink_to(directory / "train.jsonl")
    if logs:
        for name in ("first", "second", "full"):
            run = directory / "runs" / name
            run.mkdir(parents=True)
            lines = [{"step": step, "seconds": step, "loss": 3 - step / 10, "lr": 1e-3} for step in (1, 2, 3)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return directory


def run_python_block(text: str, earlier: list[str], place: str, name: str) -> bool:
    """Execute a block in its place. It finds what it takes for given (GIVEN), and what earlier blocks of its page import and
    call `config`. Called on every rank."""
    os.chdir(place)
    names: dict[str, Any] = {}
    for block in earlier:
        kept = [node for node in ast.parse(block).body if _is_kept(node)]
        exec(compile(ast.Module(kept, []), name, "exec"), names)
    for given in sorted(_free_names(text) & GIVEN.keys() - names.keys(), key=list(GIVEN).index):
        if given not in names:
            names |= GIVEN[given](names)
    exec(compile(text, name, "exec"), names)
    return True


def _is_kept(node: ast.stmt) -> bool:
    named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "config"
    return isinstance(node, ast.Import | ast.ImportFrom) or named


def _free_names(text: str) -> set[str]:
    """Names that a block reads before it sets them at its top level (a loop's own variables aside)."""
    found: set[str] = set()
    set_by: set[str] = set()
    for statement in ast.parse(text).body:
        nodes = list(ast.walk(statement))
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        loaded = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        inside = stored if isinstance(statement, ast.For | ast.FunctionDef | ast.ClassDef) else set()
        found |= loaded - set_by - inside
        set_by |= stored
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                set_by |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def _model(names: dict[str, Any]) -> dict[str, Any]:
    return {"model": AutoModelForCausalLM.from_pretrained("MODEL")}


def _tokenizer(names: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer": AutoTokenizer.from_pretrained("MODEL")}


def _loader(names: dict[str, Any]) -> dict[str, Any]:
    return {"loader": [step[0] for step in batches(steps=3, micro_batches=1, batch=2, length=8, vocab=97, seed=0)]}


def _config(names: dict[str, Any]) -> dict[str, Any]:
    return {"config": LoSiAConfig(period=2)}


def _training(names: dict[str, Any]) -> dict[str, Any]:
    """A model whose subnets trained for two steps, with all that trains it."""
    names = {**_model(names), **_loader(names), **_config(names), **names}
    model = get_losia_model(names["model"], names["config"])
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    losia = LoSiA(model, optimizer, names["config"])
    for batch in names["loader"][:2]:
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        losia.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "losia": losia}


def _engine(names: dict[str, Any]) -> dict[str, Any]:
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    engine, *_ = initialize(model=_model(names)["model"], losia_config=LoSiAConfig(period=2), config=settings, lr=1e-3)
    for batch in _loader(names)["loader"][:2]:
        engine.backward(engine(**batch).loss)
        engine.step()
    return {"engine": engine}


def _arguments(names: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainingArguments

    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    return {"training_args": TrainingArguments("trained", use_cpu=True, dataloader_pin_memory=False, **settings)}


def _data(names: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset

    rows = torch.arange(3, 67).reshape(8, 8).tolist()
    return {"data": Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])}


def _trainer(names: dict[str, Any]) -> dict[str, Any]:
    """A trainer that was interrupted: a checkpoint of its first step is there."""

    def made(steps: int) -> Any:
        arguments = _arguments(names)["training_args"]
        arguments.max_steps, arguments.save_steps = steps, 1
        arguments.save_strategy = "steps"
        data = _data(names)["data"]
        return LoSiATrainer(
            model=_model(names)["model"], args=arguments, train_dataset=data, losia_config=LoSiAConfig(period=2)
        )

    made(1).train()
    return {"trainer": made(2)}


def _accelerator(names: dict[str, Any]) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = get_losia_model(_model(names)["model"], LoSiAConfig(period=2))
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    losia = LoSiA(model, optimizer, LoSiAConfig(period=2))
    for batch in _loader(names)["loader"][:1]:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
    return {"accelerator": accelerator, "model": model, "optimizer": optimizer, "losia": losia}


# What a block may take for given, each made once for it; later ones may set several.
GIVEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "tokenizer": _tokenizer,
    "accelerator": _accelerator,
    "engine": _engine,
    "trainer": _trainer,
    "losia": _training,
    "optimizer": _training,
    "scheduler": _training,
    "model": _model,
    "loader": _loader,
    "config": _config,
    "training_args": _arguments,
    "data": _data,
}
