"""launch/train.py in processes of its own, under every launcher, on a tiny model with a tokenizer of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_material(directory: Path) -> dict[str, Path]:
    """A model of 3 layers in fp32 with its tokenizer, and 48 records in each form (40 to train on, 8 held out)."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    inner = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(bytes_)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=36,
        intermediate_size=77,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    chance = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "sun", "moon"]
    pairs = [(" ".join(chance.choices(words, k=chance.randint(1, 5))), chance.choice(words)) for _ in range(48)]
    forms = {
        "instruction": [{"instruction": f"Say it: {question}", "output": answer} for question, answer in pairs],
        "chat": [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in pairs
        ],
        "text": [{"text": f"{question} {answer}"} for question, answer in pairs],
    }
    paths = {"model": directory / "model"}
    for form, records in forms.items():
        for part, chosen in ((form, records[:40]), (f"{form}_heldout", records[40:])):
            paths[part] = directory / f"{part}.jsonl"
            paths[part].write_text("".join(json.dumps(record) + "\n" for record in chosen), encoding="utf-8")
    paths["losia"] = directory / "losia.yaml"
    paths["losia"].write_text("rank_factor: 0.25\noutput_rank_factor: 0.25\nperiod: 2\nlayers_per_slot: 2\nrewarm_steps: 1\n")
    return paths


@dataclass
class Launched:
    """How a launch ended and what it left."""

    code: int
    output: str  # standard output and standard error together
    directory: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def values(self, name: str) -> list[float]:
        """A metric over the steps at which it was logged."""
        return [line[name] for line in self.metrics if name in line]

    @property
    def errors(self) -> list[str]:
        """Lines that begin with "error:", a rank's prefix from the launcher left out."""
        lines = [line.split("]:", 1)[-1].strip() for line in self.output.splitlines()]
        return [line for line in lines if line.startswith("error:")]

    @property
    def own_traceback(self) -> bool:
        """Whether a traceback goes through the package; launchers print tracebacks of their own about exit codes."""
        return any("losia_dist/" in line and ", line " in line for line in self.output.splitlines())


def arguments(material: dict[str, Path], directory: Path, **options: Any) -> list[str]:
    """Options of a short run in fp32; True is a flag, a list several values, None leaves an option out."""
    chosen: dict[str, Any] = {
        "model": material["model"],
        "train_file": material["instruction"],
        "eval_file": material["instruction_heldout"],
        "output_dir": directory,
        "losia": True,
        "losia_config": material["losia"],
        "precision": "fp32",
        "max_length": 64,
        "micro_batch": 2,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        **options,
    }
    words: list[str] = []
    for name, value in chosen.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def launch(launcher: list[str], words: list[str], directory: Path, timeout: float = 150, **environment: str) -> Launched:
    """Run launch/train.py to its end; a launch that outlives `timeout` seconds is ended with all its processes."""
    variables = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        **environment,
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    process = subprocess.Popen(
        [*launcher, str(ROOT / "launch" / "train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"the launch did not end within {timeout:.0f} s:\n{output[-4000:]}") from None
    return Launched(process.returncode, output, directory)


def torchrun(ranks: int) -> list[str]:
    return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
