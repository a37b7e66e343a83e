"""What a run prints and logs, in words and numbers that are true."""

import json

import pytest

from losia_dist.cli.main import train_main
from losia_dist.recipe.logs import RunLog
from losia_dist.recipe.trajectory import Progress
from tests.support.launching import arguments, make_material


def test_numbers_are_printed_as_people_read_them(tmp_path, capsys):
    log = RunLog(tmp_path, 8, True, Progress(), continues=False)
    log.record(1, loss=4.3141, tokens_per_second=1020.4, lr=5e-5)
    log.close()
    said = capsys.readouterr().out
    assert "step 1/8: loss 4.31, 1,020 tokens/s, rate 5e-05, 0:00:00 left" in said


@pytest.mark.parametrize("selection", ["greedy", "random"])
def test_only_subnets_that_are_located_localize(tmp_path, selection):
    material = make_material(tmp_path)
    material["losia"].write_text(f"rank_factor: 0.25\nperiod: 1\nselection: {selection}\n")
    assert train_main(arguments(material, tmp_path / "run", max_steps=2, no_save=True, eval_file=None)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["localizing" in line for line in lines if "loss" in line] == [selection == "greedy"] * 2
