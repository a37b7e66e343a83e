"""The files that `losia-dist plan --output` writes are ones that the script, DeepSpeed and bash take."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from losia_dist import LoSiAConfig
from losia_dist.cli.main import main
from losia_dist.recipe.fsdp import Sharding
from losia_dist.recipe.options import check
from losia_dist.tools.plan.launch_files import deepspeed_settings
from losia_dist.tools.plan.shapes import find_shape
from losia_dist.tools.plan.workload import Cluster, Workload

CONFIGS = Path(__file__).parents[2] / "configs"


def write(directory: Path, *words: str) -> None:
    base = ["plan", "--model", "llama-2-7b", "--gpus-per-node", "4", "--json", "--rank-factor", "0.25", "0.0625"]
    assert main([*base, "--output", str(directory), *words]) == 0


def script_options(directory: Path) -> tuple[str, object]:
    """The launcher's words, and the script's options as its own parser reads them."""
    import argparse

    from losia_dist.recipe.options import add_training_arguments

    text = (directory / "launch.sh").read_text()
    subprocess.run(["bash", "-n", directory / "launch.sh"], check=True)
    command = re.search(r"^exec (.*?)$\n?(?!.*^exec)", text.replace("\\\n", ""), re.MULTILINE | re.DOTALL).group(1)
    command = re.sub(r'"\$\{(\w+):[^}]*\}"', r"value-of-\1", command).replace('"$@"', "")
    start, _, options = command.partition("launch/train.py")
    return start, add_training_arguments(argparse.ArgumentParser()).parse_args(shlex.split(options))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp"])
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_command_of_plain_pytorch(tmp_path, engine, nodes):
    shards = ["--shard-ranks", "2"] if engine == "hsdp" else []
    write(tmp_path, "--engine", engine, "--nodes", nodes, "--sequence-length", "1024", "--checkpointing", "off", *shards)
    start, options = script_options(tmp_path)
    assert start.startswith("torchrun --nproc_per_node 4")
    assert ("--nnodes 2 --node_rank value-of-NODE_RANK --master_addr value-of-MASTER_ADDR" in start) == (nodes == "2")
    config = check(options)
    assert config == LoSiAConfig.from_file(tmp_path / "losia.yaml") == LoSiAConfig(rank_factor=(0.25, 0.0625))
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
    assert not options.losia and not (tmp_path / "a b" / "losia.yaml").exists()
    assert options.sharding == "fsdp2" and start.startswith("torchrun")
    write(tmp_path / "c d", "--engine", "zero2")
    assert script_options(tmp_path / "c d")[1].deepspeed == f"{tmp_path}/c d/deepspeed.json"
