"""`losia-dist train run.yaml`: one file for a run, whose lines are the options."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from losia_dist.cli import main as cli
from losia_dist.config.losia_config import LoSiAConfig
from tests.launch.test_bad_inputs import refused
from tests.support.launching import arguments


def lines_of(directory):
    """What a run logged, without what depends on the clock and the process."""
    kept = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in kept:
        for name in ("seconds", "tokens_per_second", "peak_memory_gb"):
            line.pop(name, None)
    return kept


def write_run(path, words, **more):
    """A run file with what these words say."""
    values, name = {}, None
    for word in map(str, words):
        if word.startswith("--"):
            name = word[2:]
            values[name] = True
        else:
            values[name] = yaml.safe_load(word)
    path.write_text(yaml.safe_dump({**values, **more}))
    return path


def test_a_run_file_trains_as_the_options_do_and_options_beside_it_win(material, tmp_path):
    words = arguments(material, tmp_path / "flags", max_steps=3, no_save=True)
    assert cli.main(["train", *words]) == 0
    settings = yaml.safe_load(material["losia"].read_text())
    file = write_run(tmp_path / "run.yaml", words, output_dir=str(tmp_path / "file"), losia_config=settings, max_steps=9)
    assert cli.main(["train", str(file), "--max_steps", "3"]) == 0
    assert lines_of(tmp_path / "flags") == lines_of(tmp_path / "file")
    kept = [LoSiAConfig.from_pretrained(tmp_path / name) for name in ("flags", "file")]
    assert kept[0] == kept[1] == LoSiAConfig.from_file(material["losia"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("micro_batches: 3", "run.yaml: unknown .*micro_batches.*micro_batch"),
        ("micro_batch: two", "argument --micro_batch: invalid int value: 'two'.*run.yaml"),
        ("losia: 3", "run.yaml: losia: 3: true or false"),
        ("overlong: cut", "argument --overlong: invalid choice: 'cut'.*run.yaml"),
        ("micro_batch: 1\nmicro_batch: 2", "'micro_batch' is given twice"),
        ("- 1", "run.yaml must hold 'name: value' lines"),
        ("losia_config: {periods: 3}", "losia_config.*periods.*period"),
        (None, "run file .*missing.yaml cannot be read"),
    ],
)
def test_what_is_wrong_in_a_run_file_is_one_line(material, tmp_path, capsys, text, words):
    import re

    path = tmp_path / "missing.yaml" if text is None else tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text + "\n")
    rest = arguments(material, tmp_path / "run", micro_batch=None, losia="losia:" not in (text or ""), losia_config=None)
    assert re.search(words, refused(capsys, [path, *rest]))


def test_a_run_file_may_stand_behind_what_the_deepspeed_launcher_adds(material, tmp_path, capsys):
    file = write_run(tmp_path / "run.yaml", arguments(material, tmp_path / "run", micro_batch=0))
    assert "--micro_batch 0: at least 1" in refused(capsys, ["--local_rank=0", file])


@pytest.mark.slow
def test_torchrun_starts_the_installed_command_with_a_run_file(material, tmp_path):
    file = write_run(tmp_path / "run.yaml", arguments(material, tmp_path / "run", max_steps=2, no_save=True))
    words = ["--standalone", "--nproc_per_node", "2", "-m", "losia_dist", "train", str(file)]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
