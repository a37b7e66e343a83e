"""Bad inputs of the script: one line that begins with "error:", exit code 2, on every rank and without a hang."""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from losia_dist import releases
from losia_dist.cli import main as cli
from losia_dist.errors import ConfigError
from losia_dist.recipe import capacity, environment, script
from losia_dist.recipe.choice import EngineChoice
from losia_dist.recipe.environment import find_process
from tests.launch.test_script_engines import options_of, train
from tests.support.launching import ROOT, arguments, launch, torchrun

GOOD = json.dumps({"instruction": "a", "output": "b"})


def refused(capsys, words) -> str:
    """The one line that the script says when it refuses these options."""
    capsys.readouterr()
    try:
        code = cli.train_main([str(word) for word in words])
    except SystemExit as exit:
        code = exit.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line and line.strip()]
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


DATA = [
    (None, "bad.jsonl: no such file"),
    ("", "bad.jsonl: the data set is empty"),
    (f"{GOOD}\n{{oops\n", "bad.jsonl, line 2: malformed JSON"),
    (f"{GOOD}\n\n[1]\n", "bad.jsonl, line 3: expected a JSON object, got list [1]"),
    (f'{GOOD}\n{{"instruction": "a"}}\n', "bad.jsonl, line 2: a record of the form 'instruction' needs"),
    (f"{GOOD}\n", "1 examples do not fill one batch on every rank: micro_batch=2 on 1 ranks"),
]


@pytest.mark.parametrize("content, words", DATA)
def test_bad_data_is_named_with_its_line(capsys, material, tmp_path, content, words):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_text(content)
    assert words in refused(capsys, arguments(material, tmp_path / "run", train_file=file))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_length": 512}, "max_length=512 is above the model's context of 128 tokens"),
        ({"max_length": 12, "overlong": "error"}, r"instruction.jsonl, line 1: the record has"),
        ({"overlong": "cut"}, "argument --overlong: invalid choice: 'cut' (choose from"),
        ({"learn_rate": 1}, "unrecognized arguments: --learn_rate 1"),
        ({"micro_batch": "two"}, "argument --micro_batch: invalid int value: 'two'"),
        ({"micro_batch": 0}, "--micro_batch 0: at least 1 is needed"),
        ({"learning_rate": "nan"}, "--learning_rate nan: a number above 0 is needed"),
        ({"max_grad_norm": "nan"}, "--max_grad_norm nan: at least 0 is needed"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio 1.5: a share in [0, 1] is needed"),
        ({"validation_size": "some"}, "'some' is neither a number of records nor a share below 1"),
        ({"validation_size": 4}, "--eval_file and --validation_size both name held-out data"),
        ({"eval_file": None, "eval_steps": 2}, "--eval_steps 2 needs held-out data"),
        ({"samples": 1, "packing": True}, "--samples does not work with --packing"),
        ({"losia": None}, "--losia_config has no effect without --losia"),
        ({"sharding": "fsdp3"}, "--sharding fsdp3: give fsdp2, fsdp2-no-reshard, or hsdp:N"),
        ({"sharding": "hsdp"}, "--sharding hsdp: give fsdp2"),
        ({"sharding": "fsdp2"}, "--sharding needs at least two ranks"),
        ({"sharding": "fsdp2", "deepspeed": "zero2.json"}, "--deepspeed and --sharding are two engines"),
        ({"offload": True}, "--offload belongs to --sharding"),
        ({"deepspeed": "absent.json"}, "DeepSpeed configuration absent.json cannot be read"),
        ({"model": "./absent"}, "--model ./absent: no model and tokenizer could be read"),
        ({"losia_config": "absent.yaml"}, "LoSiA configuration absent.yaml cannot be read"),
        ({"attn_implementation": "fast"}, "the model could not be loaded"),
    ],
)
def test_bad_options_are_named_with_the_rule(capsys, material, tmp_path, options, words):
    assert words in refused(capsys, arguments(material, tmp_path, **options))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fp16": {"enabled": True}}, '"fp16.enabled": True'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, '"lr": 0.5 in {file} contradicts --learning_rate 0.003'),
        ({"scheduler": {"type": "WarmupLR"}}, '"scheduler" in {file}'),
        ({"train_batch_size": 64}, '"train_batch_size": 64 in {file} contradicts --micro_batch x --gradient_accumulation'),
        ({"gradient_clipping": 0.5}, '"gradient_clipping": 0.5 in {file} contradicts --max_grad_norm 1.0'),
    ],
)
def test_deepspeed_files_that_contradict_the_options_are_refused(capsys, material, tmp_path, settings, words):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **settings}))
    assert words.format(file=file) in refused(capsys, arguments(material, tmp_path / "run", deepspeed=file))


def test_a_deepspeed_file_with_a_key_given_twice_is_refused(capsys, material, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": "2",}, "bf16": {"enabled": false}}')
    assert f'{file} gives "bf16" twice' in refused(capsys, arguments(material, tmp_path / "run", deepspeed=file))


def test_fp16_is_refused_in_full_fine_tuning_too(capsys, material, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"fp16": {"enabled": True}}))
    words = arguments(material, tmp_path / "run", deepspeed=tmp_path / "zero.json", losia=None, losia_config=None)
    assert '"fp16" in' in refused(capsys, words)


def test_an_output_directory_that_cannot_be_made_is_refused_before_the_model_is_read(capsys, material, tmp_path):
    (tmp_path / "taken").write_text("")
    for directory in (tmp_path / "taken", tmp_path / "taken" / "run"):
        assert "cannot be written" in refused(capsys, arguments(material, directory, model="./absent"))
    assert (tmp_path / "taken").is_file()


@pytest.mark.parametrize(
    "name, version, options, words",
    [
        ("torch", "2.6.0", {}, r"torch 2\.6\.0 is installed, and this release needs torch>=[\d.]+: pip install 'torch>="),
        ("transformers", "6.0.0", {}, r"transformers 6\.0\.0 is installed, and this release needs transformers<6,>="),
        ("datasets", None, {}, r"datasets is not installed: pip install 'datasets>="),
        (
            "deepspeed",
            None,
            {"deepspeed": "absent.json"},
            r"deepspeed is not installed, which \[deepspeed\] brings: pip",
        ),
        ("bitsandbytes", "0.40", {"quantization": "nf4"}, r"bitsandbytes 0\.40 is installed, and this release needs"),
    ],
)
def test_a_release_outside_the_bounds_or_a_missing_package_is_one_line(
    capsys, material, tmp_path, monkeypatch, name, version, options, words
):
    real = releases.installed
    monkeypatch.setattr(releases, "installed", lambda asked: version if asked == name else real(asked))
    assert re.search(words, refused(capsys, arguments(material, tmp_path / "run", **options)))


@pytest.mark.parametrize(
    "bounds, version, fits",
    [
        (">=2.10", "2.10.0a0+b4e4ee8", True),  # as NVIDIA's images name theirs
        (">=2.10", "2.14.0.dev20261101+cpu", True),
        (">=2.10", "2.9.0a0+145a3a7", False),
        (">=5.12,<6", "5.12.0.dev0", True),
        (">=5.12,<6", "6.0.0.dev0", False),
        (">=0.19.8,<0.20", "0.19.9+unknown", True),
        (">=0.19.8,<0.20", "0.20.0rc1", False),
        (">=2.10", "unknown", True),
    ],
)
def test_previews_count_as_their_release_and_unreadable_versions_are_not_refused(bounds, version, fits):
    assert releases.admits(bounds, version) == fits


def test_a_package_without_metadata_is_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("built_in_place", "half_removed"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "half_removed-1.0.dist-info").mkdir()
    (tmp_path / "gone-1.0.dist-info").mkdir()
    (tmp_path / "gone").mkdir()  # a folder of data, maybe
    assert [releases.installed(name) for name in ("built-in-place", "half-removed")] == [releases.UNKNOWN] * 2
    assert releases.installed("gone") is None and releases.installed("PyYAML") not in (None, releases.UNKNOWN)
    assert releases.admits(">=2", releases.UNKNOWN)


def of_a_terabyte(model: Path, target: Path) -> Path:
    """A model of as many bytes by its files, which take none of the disk."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    header = json.dumps(
        {"lm_head.weight": {"dtype": "BF16", "shape": [1 << 20, 1 << 19], "data_offsets": [0, 1 << 40]}}
    ).encode()
    with open(target / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    return target


def test_a_model_that_no_memory_here_holds_is_refused_before_it_is_read(ranks, capsys, material, tmp_path):
    model = of_a_terabyte(material["model"], tmp_path / "large")
    said = refused(capsys, arguments(material, tmp_path / "run", model=model))
    assert re.search(r"its weights alone take at least 1,?649 GB of each rank's memory, and [\d.]+ GB are free here", said)
    shared = arguments(material, tmp_path / "run", model=model, sharding="fsdp2", precision="bf16")
    (kind, words), other = ranks.errors(2, train, shared)
    assert (kind, words) == other and kind == "ConfigError" and "at least 412 GB of each rank's memory" in words
    assert "--quantization nf4" in words and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "zero, fits",
    [({}, False), ({"offload_param": {"device": "cpu"}}, True), ({"cpu_offload_param": True}, True)]
    + [({"cpu_offload_param": False}, False)],
)
def test_weights_that_zero3_offloads_need_not_fit_a_gpu(material, tmp_path, zero, fits):
    choice = EngineChoice({"zero_optimization": {"stage": 3, **zero}}, None, False, (), "bf16", "off")
    options = argparse.Namespace(model=str(of_a_terabyte(material["model"], tmp_path / "large")), quantization=None)
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="its weights alone take at least"):
        capacity.check_memory(options, choice, environment.Process(0, 2, torch.device("cuda", 0)), free=80 * 10**9)


@pytest.mark.parametrize("is_integrated", [True, False])
def test_a_gpu_that_shares_the_hosts_memory_has_what_the_page_cache_would_give_up(monkeypatch, is_integrated):
    properties = argparse.Namespace(is_integrated=is_integrated)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1 << 40))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    free, place = capacity._free_memory(environment.Process(0, 1, torch.device("cuda", 0)))
    assert (free > 1000) == is_integrated and place == "on cuda:0"


def test_a_file_system_too_small_for_what_a_run_writes_is_refused(capsys, material, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: full)
    said = refused(capsys, arguments(material, tmp_path / "run", save_steps=1))
    assert "run: the trained model and checkpoints' base take at least" in said and "GB are free there" in said
    said = refused(capsys, arguments(material, tmp_path / "run", no_save=True, save_steps=1))
    assert "run: checkpoints' base take" in said
    assert cli.train_main([str(word) for word in arguments(material, tmp_path / "run", no_save=True, max_steps=1)]) == 0


def test_ranks_of_accelerate_that_were_not_started_are_missed(capsys, material, tmp_path, monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` sets."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert "asked for several processes and started this one alone" in refused(capsys, arguments(material, tmp_path))


def test_an_address_that_is_taken_is_named(capsys, material, tmp_path, monkeypatch):
    """As by ranks that live on after their launcher was killed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        said = refused(capsys, arguments(material, tmp_path))
    assert f"rank 0 is to be met at 127.0.0.1:{port}, and something else listens there" in said


def train_apart(directories, words, changes):
    """Each rank in a directory of its own, so that one name can mean different files; raises what the script raises."""
    process, before = find_process(), os.getcwd()
    os.chdir(directories[process.rank])
    try:
        script.train(options_of([*words, *changes[process.rank]]), process, dist.new_group(backend="gloo"))
    finally:
        os.chdir(before)


@pytest.fixture
def apart(material, tmp_path):
    """Two directories with the same model, data and LoSiA configuration under the same names."""
    directories = [tmp_path / "zero", tmp_path / "one"]
    for directory in directories:
        directory.mkdir()
        shutil.copytree(material["model"], directory / "model")
        for name in ("instruction.jsonl", "instruction_heldout.jsonl", "losia.yaml"):
            shutil.copy(material["losia"].parent / name, directory / name)
    return directories


NAMES = {
    "model": "./model",
    "train_file": "instruction.jsonl",
    "eval_file": "instruction_heldout.jsonl",
    "losia_config": "losia.yaml",
}


def no_file(directory: Path) -> None:
    (directory / "instruction.jsonl").unlink()


def no_weights(directory: Path) -> None:
    (directory / "model" / "model.safetensors").unlink()


def shorter(directory: Path) -> None:
    lines = (directory / "instruction.jsonl").read_text().splitlines(keepends=True)
    (directory / "instruction.jsonl").write_text("".join(lines[:30]))


def another_record(directory: Path) -> None:
    lines = (directory / "instruction.jsonl").read_text().splitlines(keepends=True)
    (directory / "instruction.jsonl").write_text("".join([*lines[:39], GOOD + "\n"]))


def another_held_out(directory: Path) -> None:
    (directory / "instruction_heldout.jsonl").write_text((GOOD + "\n") * 8)


def another_period(directory: Path) -> None:
    (directory / "losia.yaml").write_text((directory / "losia.yaml").read_text().replace("period: 2", "period: 3"))


def broken_configuration(directory: Path) -> None:
    (directory / "losia.yaml").write_text("periods: 3\n")


@pytest.mark.parametrize(
    "change, kind, words",
    [
        (no_file, "DataError", "rank 1 of 2: instruction.jsonl: no such file"),
        (no_weights, "ConfigError", "rank 1 of 2: --model ./model: the model could not be loaded"),
        (shorter, "ConfigError", "count of the training examples is 40 on rank 0 and 30 on rank 1"),
        (another_record, "ConfigError", "hash of the training examples"),
        (another_held_out, "ConfigError", "hash of the held-out examples"),
        (another_period, "ConfigError", "period is 2 on rank 0 and 3 on rank 1"),
        (broken_configuration, "ConfigError", "rank 1 of 2: losia.yaml: unknown option 'periods'. Did you mean period"),
    ],
)
def test_what_is_wrong_on_one_rank_stops_all_with_the_same_words(ranks, material, apart, change, kind, words):
    change(apart[1])
    began = time.monotonic()
    answers = ranks.errors(2, train_apart, apart, arguments(material, Path("run"), **NAMES), [[], []])
    assert len(set(answers)) == 1
    assert answers[0][0] == kind and words in answers[0][1]
    assert time.monotonic() - began < 60


def test_options_that_differ_between_ranks_stop_all(ranks, material, apart):
    words = arguments(material, Path("run"), **NAMES)
    for kind, message in ranks.errors(2, train_apart, apart, words, [[], ["--seed", "1"]]):
        assert kind == "ConfigError" and "ranks differ in the options: seed is 0 on rank 0 and 1 on rank 1" in message


@pytest.mark.slow
def test_a_launch_with_different_data_on_one_rank_ends_with_one_line(material, apart):
    shorter(apart[1])
    enter = f'cd "{apart[0].parent}/$([ "$LOCAL_RANK" = 0 ] && echo zero || echo one)" && exec python "$@"'
    launcher = [*torchrun(2), "--no_python", "bash", "-c", enter, "launch"]
    run = launch(launcher, arguments(material, Path("run"), **NAMES), apart[0] / "run", timeout=90)
    assert run.code != 0
    assert len(run.errors) == 1, run.output[-3000:]
    assert "count of the training examples is 40 on rank 0 and 30 on rank 1" in run.errors[0]
    assert not run.own_traceback
    assert run.output.count("exitcode  : 2") >= 1


def refuse_as_a_rank(words):
    """Exit code and standard error of this rank of the pool, which it does not leave."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(text):
        patch.setattr(environment, "end_process_group", lambda: None)
        code = cli.train_main(words)
    return code, text.getvalue()


def test_one_rank_of_several_says_what_a_bad_option_is(ranks, material, tmp_path):
    words = arguments(material, tmp_path, deepspeed=ROOT / "configs" / "deepspeed" / "zero2.json", sharding="fsdp2")
    (code, said), other = ranks(2, refuse_as_a_rank, words)
    assert other == (code, "") and code == 2
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and "--deepspeed and --sharding are two engines" in said


@pytest.mark.slow
def test_a_launch_with_a_bad_option_says_so_once(material, tmp_path):
    words = arguments(material, tmp_path, deepspeed=ROOT / "configs" / "deepspeed" / "zero2.json", sharding="fsdp2")
    run = launch(torchrun(2), words, tmp_path, timeout=90)
    assert run.code != 0 and len(run.errors) == 1 and not run.own_traceback
    assert "--deepspeed and --sharding are two engines" in run.errors[0]
