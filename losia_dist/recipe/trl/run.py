"""One run of a TRL trainer with LoSiA, from its options to the exported model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.data.sources import read_sources
from losia_dist.errors import ConfigError
from losia_dist.recipe.trl.kinds import KINDS, classes_of
from losia_dist.recipe.trl.options import read_config
from losia_dist.recipe.trl.rewards import read_reward, reasoning_gym_task
from losia_dist.releases import check_releases


def train_with_trl(kind: str, options: argparse.Namespace) -> None:
    """Train and save a plain model into output_dir. Called by all ranks, under any launcher.

    Raises:
        LoSiAError: what cannot work, before a model is read where that is possible.
    """
    check_releases("trl", *(["deepspeed"] if getattr(options, "deepspeed", None) else []))
    losia_config = LoSiAConfig.read(options.losia_config) if options.losia_config else LoSiAConfig()
    rewards: dict[str, Any] = {}
    if kind == "grpo":
        rows, rewards["reward_funcs"] = _problems(options)
    else:
        rows = _rows(options.train_file, kind)
    held_out = _dataset(_rows(options.eval_file, kind)) if options.eval_file else None
    config = read_config(kind, options)
    if kind == "reward" and losia_config.modules_to_save is None:
        losia_config = replace(losia_config, modules_to_save=["score"])  # the new head, which starts from nothing
    trainer_class, _ = classes_of(kind)
    trainer = trainer_class(
        model=options.model,
        args=config,
        train_dataset=_dataset(rows),
        eval_dataset=held_out,
        losia_config=losia_config,
        **rewards,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.process_index == 0:
        print(f"written: {config.output_dir}")


def _problems(options: argparse.Namespace) -> tuple[list[Any], Any]:
    if options.task is not None:
        if options.train_file or options.reward:
            raise ConfigError("--task brings data and a reward of its own: leave out --train_file and --reward, or --task.")
        return reasoning_gym_task(options.task, options.task_settings, options.task_size, options.seed)
    if not (options.train_file and options.reward):
        raise ConfigError("losia-dist grpo needs problems and a reward: --train_file and --reward MODULE:FUNCTION, or --task.")
    return _rows(options.train_file, "grpo"), read_reward(options.reward)


def _rows(sources: list[str], kind: str) -> list[Any]:
    raw = read_sources(sources)
    needs = KINDS[kind].needs
    for place, row in enumerate(raw.rows):
        missing = [name for name in needs if row.get(name) is None]
        if missing:
            raise ConfigError(f"{raw.place(place)}: losia-dist {kind} needs {', '.join(needs)}; {missing[0]} is missing.")
    return [*raw.rows]


def _dataset(rows: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)
