"""`losia-dist dpo`, `kto`, `reward` and `grpo`: TRL's trainers with LoSiA, under any launcher."""

from __future__ import annotations

import argparse
from functools import partial

from losia_dist.cli.parser import refuse
from losia_dist.errors import LoSiAError


def _add(kind: str, parser: argparse.ArgumentParser) -> None:
    from losia_dist.recipe.trl.options import add_trl_arguments

    try:
        add_trl_arguments(kind, parser)
    except LoSiAError as error:
        refuse(str(error))


def _run(kind: str, options: argparse.Namespace) -> int:
    from losia_dist.recipe.environment import end_process_group
    from losia_dist.recipe.trl.run import train_with_trl

    train_with_trl(kind, options)
    end_process_group()
    return 0


add_dpo_arguments, run_dpo = partial(_add, "dpo"), partial(_run, "dpo")
add_kto_arguments, run_kto = partial(_add, "kto"), partial(_run, "kto")
add_reward_arguments, run_reward = partial(_add, "reward"), partial(_run, "reward")
add_grpo_arguments, run_grpo = partial(_add, "grpo"), partial(_run, "grpo")
