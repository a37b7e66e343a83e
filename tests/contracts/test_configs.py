"""Every configuration file that ships is one that works: loaded by whoever reads it, and started where that is possible."""

import copy
import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
import yaml

import losia_dist
from losia_dist import LoSiAConfig, initialize
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.formulas import cycle_steps
from losia_dist.integrations.accelerate.launch_settings import LaunchSettings, read_launch_settings
from losia_dist.localization.schedule import resolve_layers_per_slot
from losia_dist.recipe.fsdp import Sharding
from tests.support.models import tiny_llama

CONFIGS = Path(__file__).parents[2] / "configs"
PACKAGED = Path(losia_dist.__file__).parent / "config" / "presets"
LOSIA, DEEPSPEED, ACCELERATE = (sorted(kind.iterdir()) for kind in (PACKAGED, CONFIGS / "deepspeed", CONFIGS / "accelerate"))


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", LOSIA, ids=by_name)
def test_losia_recipes_load(path):
    config = LoSiAConfig.preset(path.stem)
    assert config == LoSiAConfig.read(path.stem) == LoSiAConfig.from_file(path)
    assert set(yaml.safe_load(path.read_text())) <= {field.name for field in dataclasses.fields(LoSiAConfig)}
    # As many values as the paper's 1/8 x 1/8; the short run's drawn subnets have four times as many (docs/quality.md).
    assert config.row_factor * config.column_factor == (1 / 16 if config.located is None else 1 / 64)
    assert path.read_text().startswith("#")


@pytest.mark.parametrize("name, layers, steps", [("7b", 32, 2400), ("13b", 40, 2000), ("70b", 80, 1000)])
def test_recipes_by_size_keep_what_their_comments_promise(name, layers, steps):
    config = LoSiAConfig.from_file(PACKAGED / f"{name}.yaml")
    text = (PACKAGED / f"{name}.yaml").read_text().replace("\n# ", " ")
    assert (config.located.start, config.layers_per_slot, config.cycles) == ("importance", "auto", 1)
    chosen = resolve_layers_per_slot(config, steps, layers, 8).layers_per_slot
    slots = (steps - 1) // config.period
    assert f"{steps:,} steps give {slots} slots before the last: {chosen} of {layers} layers a slot" in text
    assert cycle_steps(layers, config.period, chosen) < steps


def start(path: str):
    """One step of a tiny model under the file; what DeepSpeed made of it."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    settings = {**json.loads(Path(path).read_text()), "train_micro_batch_size_per_gpu": 1}
    # A model this small would be kept whole by the file's own threshold.
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = tiny_llama().to(torch.bfloat16)
    engine, *_ = initialize(model=model, losia_config=LoSiAConfig(rank_factor=0.25, period=1), config=settings, lr=1e-3)
    ids = torch.arange(10).unsqueeze(0)
    before = engine(input_ids=ids, labels=ids, use_cache=False).loss.item()
    for _ in range(3):
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    after = engine(input_ids=ids, labels=ids, use_cache=False).loss.item()
    result = engine.zero_optimization_stage(), engine.bfloat16_enabled(), before, after
    engine.losia.detach()
    engine.destroy()
    return result


@pytest.mark.parametrize("path", DEEPSPEED, ids=by_name)
def test_deepspeed_files_train(ranks, path):
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    for got, bf16, before, after in ranks(2, start, str(path)):
        assert (got, bf16) == (stage, True)
        assert after < before


@pytest.mark.parametrize("path", ACCELERATE, ids=by_name)
def test_accelerate_files_are_read_by_its_own_loader(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))  # raises for unknown keys at the top
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for part in (config.deepspeed_config, config.fsdp_config, config.parallelism_config):
        assert set(part) <= set(known), set(part) - set(known)
    assert (config.num_machines > 1) == path.stem.endswith("multi-node")
    assert config.num_processes % config.num_machines == 0
    assert f"--config_file configs/accelerate/{path.name}" in path.read_text()


def launch_environment(path: Path, monkeypatch) -> dict[str, str]:
    """What `accelerate launch` would set for a script under this file."""
    from accelerate.commands import launch
    from accelerate.utils import launch as variables

    parsed = launch.launch_command_parser().parse_args(["--config_file", str(path), "--main_process_port", "0", "script.py"])
    parsed, defaults, _ = launch._validate_launch_command(copy.deepcopy(parsed))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return variables.prepare_deepspeed_cmd_env(parsed)[1]
    if parsed.multi_gpu or parsed.use_fsdp:
        return variables.prepare_multi_gpu_env(parsed)
    return variables.prepare_simple_launcher_cmd_env(parsed)[1]


@pytest.mark.parametrize("path", ACCELERATE, ids=by_name)
def test_the_script_takes_from_accelerate_what_the_file_says(path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda *_: False)
    written = yaml.safe_load(path.read_text())
    settings = read_launch_settings(written["num_processes"], launch_environment(path, monkeypatch))
    assert settings.precision == "bf16"
    kind = path.stem.removesuffix("-multi-node")
    if kind.startswith("zero"):
        assert settings.deepspeed["zero_optimization"] == {"stage": int(kind[-1])}
        assert settings.deepspeed["bf16"] == {"enabled": True}
        assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(settings.deepspeed)
    else:
        expected = {"fsdp2": "fsdp2", "hsdp": f"hsdp:{8 if written['num_machines'] > 1 else 4}"}.get(kind)
        assert settings == LaunchSettings(sharding=expected, precision="bf16")
        if expected:
            Sharding.parse(expected).check(written["num_processes"])


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16.*bf16"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1.*fsdp_version: 2"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP.*TRANSFORMER_BASED_WRAP"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "fsdp_activation_checkpointing_offload"),
        ({**FSDP, "FSDP_IGNORED_MODULES": "lm_head"}, "fsdp_ignored_modules"),
        ({**FSDP, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: inductor"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
    ],
)
def test_features_of_accelerate_that_the_script_lacks_are_refused(environment, words):
    with pytest.raises(UnsupportedError, match=words):
        read_launch_settings(2, environment)


def test_a_mesh_that_the_processes_do_not_fill_is_refused():
    mesh = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}
    with pytest.raises(ConfigError, match=r"replicate_size 2 x .*shard_size 8 .* number of processes, which is 8"):
        read_launch_settings(8, {**FSDP, **mesh, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"})


def test_other_launchers_leave_no_settings():
    assert read_launch_settings(2, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}) == LaunchSettings()


def test_a_deepspeed_file_named_in_accelerates_configuration_is_used():
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero3.json"}
    assert read_launch_settings(2, environment).deepspeed == "configs/deepspeed/zero3.json"
