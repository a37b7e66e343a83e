"""The documentation is executed as it is written: every Python block, every shell command, every command of an example.

A new block is taken up by itself. What a page calls MODEL or train.jsonl lies under that name in the directory where it runs;
what is changed beside that stands in SUBSTITUTED. What cannot run here stands in NOT_RUN, with the reason, and its options are
read by the parsers that would read them. Commands that start several processes run in `make test-full`.
"""

import argparse
import configparser
import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from losia_dist.cli.main import COMMANDS, main, train_main
from tests.support.documents import ROOT, Command, blocks, inline_commands, shown_commands, untold_blocks
from tests.support.shown import make_place, run_python_block

# What a machine with two cores and no cluster has instead. (pattern over the whole command, replacement)
SUBSTITUTED = [
    (r"--nproc_per_node 8", "--nproc_per_node 2"),
    (r"--nnodes 2", "--nnodes 1"),
    (r"\bHEAD:29400", "localhost:29417"),
    (r"NODES=2 GPUS=8 HEAD=10\.0\.0\.1", "NODES=1 GPUS=2 HEAD=localhost PORT=29418"),
    (r"/shared/", "shared/"),
    (r"--max_length 4096", "--max_length 1024"),  # the tiny model's context
    (r"^deepspeed launch", "deepspeed --num_accelerators 2 launch"),
]
WITHOUT_A_GPU = ["--use_cpu", "True", "--bf16", "False"]  # TRL's configurations ask for bf16 units of a GPU
NOT_RUN = {
    r"make ": "builds an environment; the target is looked up",
    r"pip install": "needs a network; the extra is looked up",
    r"sbatch ": "needs SLURM; tests/launch runs the script with a stand-in",
    r"HOSTFILE=|deepspeed --hostfile": "needs ssh and pdsh; tests/launch/test_two_hosts.py has both",
    r"accelerate launch": "Accelerate shards on GPUs only; tests/launch/test_launchers.py has it",
    r"NODES=2 .*hsdp": "shares one copy of the model among 8 GPUs of a node, and has two",
    r"python -m pytest": "is a test itself",
    r"python -m benchmarks|benchmarks/": "minutes to a night",
    r"python launch/prepare_quickstart.py": "needs the quickstart's packages; tests/launch has it",
    r"python examples/to_gguf.py": "takes a tokenizer of byte-level BPE; tests/contracts/test_gguf.py has it",
    r".*--simulate": "45 s a model; tests/unit/test_planning_simulation.py has it",
}
SHOWN, INLINE = shown_commands(), inline_commands()
# inside.md's blocks use patches that stand beside them: tests/contracts/test_inside.py applies these, and runs every block.
PYTHON = [block for block in blocks("python") if block.page.name != "inside.md"]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def reason_not_to_run(command: Command) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command.text)), None)


def starts_processes(command: Command) -> bool:
    return command.program in ("torchrun", "deepspeed", "accelerate", "python") or command.program.startswith("launch/")


def test_there_is_something_to_try():
    assert len(PYTHON) >= 7 and len(SHOWN) >= 25 and len(INLINE) >= 20
    assert not untold_blocks(), "a block that shows commands begins with ```bash"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page.stem}:{PYTHON.index(block)}")
def test_a_python_block_runs(block, ranks, tmp_path):
    place = make_place(tmp_path)
    earlier = [other.text for other in PYTHON if other.page == block.page and other.line < block.line]
    for result in ranks(2, run_python_block, block.text, earlier, str(place), f"{block.page.name}, line {block.line}"):
        assert result


class Parsed(Exception):
    """The options of a command were read; nothing else of it runs."""


@contextlib.contextmanager
def only_parsing(monkeypatch, whole):
    """Parsers read their options and end the command there. whole: what is required must be there."""
    from transformers import HfArgumentParser

    read, read_classes = argparse.ArgumentParser.parse_args, HfArgumentParser.parse_args_into_dataclasses
    read_known = argparse.ArgumentParser.parse_known_args

    def parse(self, *arguments, **named):
        raise Parsed(read(self, *arguments, **named))

    def parse_known(self, *arguments, **named):
        for action in () if whole else self._actions:
            action.required = False
        return read_known(self, *arguments, **named)

    def parse_classes(self, *arguments, **named):
        raise Parsed(read_classes(self, *arguments, **named))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_classes)
        patch.setattr(sys, "exit", lambda code=0: (_ for _ in ()).throw(AssertionError(f"refused with exit code {code}")))
        with pytest.raises(Parsed):
            yield patch


def launched(words: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own words, and the program that it starts with its words."""
    for place, word in enumerate(words):
        if place and (word == "losia-dist" or word.endswith(".py") or word == "-m"):
            return words[:place], words[place:]
    return [], words


def read_launcher(words: list[str], started: list[str]) -> None:
    """The launcher's parser takes these words."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args([*words[1:], *started]).training_script == started[started[0] == "-m"]
    elif words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert parse_args([*words[1:], *started]).user_script == started[0]
    elif words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert launch_command_parser().parse_args([*words[2:], *started]).training_script == started[0]
    else:
        assert words == ["python"], f"nobody knows how to read {words}"


def read_program(words: list[str], monkeypatch, whole: bool) -> None:
    """The parser of the program takes its words; all that it asks for is there if the command is `whole`."""
    program, *rest = words
    if words[:2] == ["-m", "losia_dist"]:
        program, rest = "losia-dist", rest[1:]
    if program == "losia-dist" and not rest:  # its name, in running text
        return
    if program == "losia-dist":
        with only_parsing(monkeypatch, whole):
            main(rest)
    elif program in ("launch/train.py", "launch/slurm/train.sbatch") or re.fullmatch(r"launch/\w+\.sh", program):
        assert (ROOT / program).is_file()
        with only_parsing(monkeypatch, whole):
            train_main(rest)
    elif program == "-m" and rest[0] == "pytest":
        assert all((ROOT / word).exists() for word in rest[1:] if not word.startswith("-"))
    elif program == "-m" and rest == ["tests.support.matrix"]:
        assert (ROOT / "tests" / "support" / "matrix.py").is_file()
    elif program == "-m" and rest[0] == "benchmarks":
        assert rest[1:] in ([], ["all"])
    elif (program == "-m" and rest[0].startswith("benchmarks.")) or program.endswith(".py"):
        arguments = rest if program.endswith(".py") else rest[1:]
        with only_parsing(monkeypatch, whole) as patch:
            patch.setattr(sys, "argv", [program, *arguments])
            patch.syspath_prepend(str(ROOT))
            if program in ("examples/sft.py", "examples/dpo.py"):
                sys.argv += WITHOUT_A_GPU
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                sys.modules.pop(rest[0], None)
                runpy.run_module(rest[0], run_name="__main__")
    else:
        raise AssertionError(f"nobody knows how to read {words}")


PLACEHOLDERS = {"ENGINE": "ddp", "N": "1", "S": "0", "...": ""}


@pytest.mark.parametrize("command", [*SHOWN, *INLINE], ids=str)
def test_the_options_of_a_command_are_read(command, monkeypatch, tmp_path):
    monkeypatch.chdir(make_place(tmp_path))
    words = [PLACEHOLDERS.get(word, word) for word in command.words]
    program = words[0]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif program == "pip":
        extras = configparser.ConfigParser()
        extras.read(ROOT / "setup.cfg")
        asked = re.search(r"(?:\.|losia_dist)\[(.*)\]", command.text).group(1).split(",")
        assert set(asked) <= set(extras["options.extras_require"])
    elif program == "benchmarks/gpu.sh":
        assert (ROOT / program).is_file()
    elif program == "sbatch":
        script = words.index("launch/slurm/train.sbatch")
        assert words[1:script] == ["--nodes", "4"]
        read_program(words[script:], monkeypatch, whole=True)
    else:
        launcher, started = launched(words)
        if len(command.words) == 2 and program in ("losia-dist", "accelerate"):  # the name of a command, in running text
            assert words[1] in (*COMMANDS, "cache", "launch", "--version")
            return
        if launcher:
            read_launcher(launcher, started)
        read_program(started, monkeypatch, whole=command in SHOWN)


def runs(command: Command):
    marks = [pytest.mark.slow] if starts_processes(command) else []
    return pytest.param(command, marks=marks, id=str(command))


@pytest.mark.parametrize("command", [runs(command) for command in SHOWN if reason_not_to_run(command) is None])
def test_a_command_runs(command, tmp_path, monkeypatch):
    accepted = (0, 1) if "doctor" in command.words else (0,)  # a doctor that finds this machine wanting has done its work
    place = make_place(tmp_path, logs="report" in command.words)
    monkeypatch.chdir(place)
    text = " ".join([*(f"{name}={value}" for name, value in command.settings.items()), *command.words])
    for pattern, instead in SUBSTITUTED:
        text = re.sub(pattern, instead, text)
    words = text.split()
    if not starts_processes(command):
        assert words[0] == "losia-dist"
        assert main(words[1:]) in accepted
        return
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z]+=", word))
    words = [word for word in words if not re.match(r"[A-Z]+=", word)]
    words += WITHOUT_A_GPU if command.page.parent.name == "examples" else []
    bin_directory = str(Path(sys.executable).parent)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in RANK_VARIABLES},
        **settings,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        words, cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode in accepted, output[-4000:]
