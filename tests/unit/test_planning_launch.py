"""The files that `losia-dist plan --output` writes are ones that the script, DeepSpeed and bash take."""

import argparse
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from losia_dist import LoSiAConfig
from losia_dist.cli.main import main
from losia_dist.recipe.fsdp import Sharding
from losia_dist.recipe.options import add_training_arguments, check
from losia_dist.recipe.run_file import with_run_file
from losia_dist.tools.plan.launch_files import deepspeed_settings
from losia_dist.tools.plan.shapes import find_shape
from losia_dist.tools.plan.workload import Cluster, Workload
from tests.support.models import tiny_llama

CONFIGS = Path(__file__).parents[2] / "configs"


def write(directory: Path, *words: str) -> None:
    base = ["plan", "--model", "llama-2-7b", "--gpus-per-node", "4", "--json", "--rank-factor", "0.25", "0.0625"]
    assert main([*base, "--output", str(directory), *words]) == 0


def script_options(directory: Path) -> tuple[str, object]:
    """The launcher's words, and the script's options as its own parser reads them."""
    text = (directory / "launch.sh").read_text()
    subprocess.run(["bash", "-n", directory / "launch.sh"], check=True)
    command = re.search(r"^exec (.*?)$\n?(?!.*^exec)", text.replace("\\\n", ""), re.MULTILINE | re.DOTALL).group(1)
    command = re.sub(r'"\$\{(\w+):[^}]*\}"', r"value-of-\1", command).replace('"$@"', "")
    start, _, options = command.partition(" -m losia_dist train ")
    assert options, command
    parser = add_training_arguments(argparse.ArgumentParser())
    return start, parser.parse_args(with_run_file(parser, shlex.split(options)))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp"])
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_command_of_plain_pytorch(tmp_path, engine, nodes):
    shards = ["--shard-ranks", "2"] if engine == "hsdp" else []
    write(tmp_path, "--engine", engine, "--nodes", nodes, "--sequence-length", "1024", "--checkpointing", "off", *shards)
    start, options = script_options(tmp_path)
    assert start.startswith("torchrun --nproc_per_node 4")
    assert ("--nnodes 2 --node_rank value-of-NODE_RANK --master_addr value-of-MASTER_ADDR" in start) == (nodes == "2")
    config = check(options)
    assert config == LoSiAConfig(rank_factor=(0.25, 0.0625))
    assert (options.max_length, options.gradient_checkpointing, options.precision) == (1024, "off", "bf16")
    assert options.sharding == {"ddp": None, "fsdp2": "fsdp2", "hsdp": "hsdp:2"}[engine]
    assert options.deepspeed is None and not options.offload
    if options.sharding:
        Sharding.parse(options.sharding).check(4 * int(nodes))


def test_offload_of_fsdp2_reaches_the_script(tmp_path):
    write(tmp_path, "--engine", "fsdp2", "--offload", "all")
    assert script_options(tmp_path)[1].offload


@pytest.mark.parametrize("engine, offload", [("zero1", "none"), ("zero2", "none"), ("zero3", "none"), ("zero3", "optimizer")])
def test_deepspeeds_file_is_the_projects_own(tmp_path, engine, offload):
    write(tmp_path, "--engine", engine, "--offload", offload, "--nodes", "2", "--micro-batch", "3")
    start, options = script_options(tmp_path)
    assert start.startswith("torchrun --nproc_per_node 4 --nnodes 2 --node_rank value-of-NODE_RANK")
    assert options.deepspeed == f"{tmp_path}/deepspeed.json" and options.micro_batch == 3
    check(options)
    shipped = CONFIGS / "deepspeed" / f"{engine}{'-offload' if offload == 'optimizer' else ''}.json"
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == json.loads(shipped.read_text())


@pytest.mark.parametrize("engine, offload", [("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "all")])
def test_deepspeed_takes_every_form_of_offload(engine, offload):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    workload = Workload(find_shape("llama-2-7b"), Cluster(), engine, offload=offload)
    zero = DeepSpeedZeroConfig(**deepspeed_settings(workload)["zero_optimization"])
    assert str(zero.offload_optimizer.device) == "cpu"
    assert (zero.offload_param is not None) == (offload == "all")


def test_full_fine_tuning_gets_no_losia_options_and_paths_with_spaces_survive(tmp_path):
    write(tmp_path / "a b", "--method", "full", "--engine", "fsdp2")
    start, options = script_options(tmp_path / "a b")
    assert not options.losia and options.losia_config is None
    assert options.sharding == "fsdp2" and start.startswith("torchrun")
    write(tmp_path / "c d", "--engine", "zero2")
    assert script_options(tmp_path / "c d")[1].deepspeed == f"{tmp_path}/c d/deepspeed.json"


def test_what_the_schedule_advises_is_written(tmp_path, capsys):
    words = ["plan", "--model", "llama-2-70b", "--engine", "fsdp2", "--steps", "2000", "--sequence-length", "1024"]
    assert main([*words, "--output", str(tmp_path / "advised")]) == 0
    said = capsys.readouterr().out
    advised = int(re.search(r"for one full cycle use layers_per_slot: (\d+)", said).group(1))
    assert advised > 1 and f"Written with layers_per_slot: {advised}, as advised for 2,000 steps" in said
    assert check(script_options(tmp_path / "advised")[1]).layers_per_slot == advised
    assert main([*words, "--layers-per-slot", "2", "--output", str(tmp_path / "asked")]) == 0
    assert check(script_options(tmp_path / "asked")[1]).layers_per_slot == 2
    capsys.readouterr()
    full = [*words, "--gpu-memory", "31"]  # enough for one layer's importance, and not for all of them
    assert main([*full, "--output", str(tmp_path / "full")]) == 0
    assert "which does not fit" in capsys.readouterr().out
    assert check(script_options(tmp_path / "full")[1]).layers_per_slot == 1


def test_init_writes_a_run_file_that_the_command_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("MODEL")
    assert main(["init", "--model", "MODEL", "--gpus", "8", "--train_file", "a.jsonl", "b.jsonl:0.5", "--steps", "30"]) == 0
    said = capsys.readouterr().out
    assert "start it: torchrun --nproc_per_node 8 -m losia_dist train run.yaml" in said
    parser = add_training_arguments(argparse.ArgumentParser())
    options = parser.parse_args(with_run_file(parser, ["run.yaml", "--micro_batch", "3"]))
    check(options)
    assert (options.model, options.train_file, options.max_steps) == ("MODEL", ["a.jsonl", "b.jsonl:0.5"], 30)
    assert options.losia and options.losia_config is None and options.micro_batch == 3
    assert main(["init", "--model", "MODEL"]) == 2
    assert "run.yaml is there already" in capsys.readouterr().err
    assert main(["init", "--model", "llama-2-7b", "--output", "other.yaml"]) == 2
    assert "give a directory or a hub name" in capsys.readouterr().err
    assert main(["init", "--model", "MODEL", "--gpu-memory", "4.00001", "--output", "other.yaml"]) == 2
    assert "Nothing fits" in capsys.readouterr().err and not Path("other.yaml").exists()
