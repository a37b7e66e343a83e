"""Weights for a rollout engine: after every hand-over a server's own model computes what the trainer's does.

The server is a process with a model of its own (tests/support/rollout_server.py), reached by TRL's client; no vLLM.
"""

import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import requests
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, LoSiATrainerMixin, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.integrations.trainer.rollout import HandOver, receive, take_over
from tests.support.cases import slow
from tests.support.launching import ROOT
from tests.support.models import tiny_llama
from tests.support.rollout_client import Client, without_vllm
from tests.support.trainers import fresh_accelerate
from tests.support.training import Run, train
from tests.support.trl_models import save_tiny_model

IDS = torch.arange(3, 19).reshape(2, 8)
SHAPES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
RUN = Run(steps=20, length=8, model=SHAPES, config={"rank_factor": 0.125, "period": 3, "layers_per_slot": 2})


def free_ports(count):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture
def server(tmp_path):
    """Starts a server over a model directory; gives its two ports."""
    started = []

    def start(model):
        ports = free_ports(2)
        words = [sys.executable, str(ROOT / "tests" / "support" / "rollout_server.py"), str(model), *map(str, ports)]
        started.append(subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL))
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                requests.get(f"http://127.0.0.1:{ports[0]}/health", timeout=5)
                return ports
            except requests.ConnectionError:
                assert started[-1].poll() is None, "the server ended"
                time.sleep(0.2)
        raise AssertionError("the server did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


def train_and_hand_over(engine, run, ports, kind):
    """On each rank: bytes of every hand-over and how far the server's logits were from the trainer's after it."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    kept = {}

    def inspect(stage, losia, deepspeed):
        if stage == "before":
            return
        if not kept:
            kept["over"] = HandOver(losia)
            if first:
                kept["client"] = Client(base_url=f"http://127.0.0.1:{ports[0]}", group_port=ports[1], connection_timeout=60)
                kept["client"].init_communicator()
        over, told = kept["over"], kept.setdefault("told", [])
        if kind == "changes":
            named = list(over.changes())
            metadata = [(name, str(tensor.dtype).removeprefix("torch."), [*tensor.shape]) for name, tensor in named]
        else:
            named, metadata = over.whole(), over.metadata()
        if first:
            kept["client"].update_named_params(metadata, iter(named))
        else:
            list(named)
        model = deepspeed or losia.model
        model.eval()
        with torch.no_grad():
            own = model(input_ids=IDS, use_cache=False).logits
        model.train()
        far = (torch.tensor(kept["client"].logits(IDS.tolist())) - own).abs().max().item() if first else 0.0
        told.append((over.bytes, far))

    with without_vllm() if first else nullcontext():
        result = train(engine, run, inspect=inspect)
        if first:
            kept["client"].close_communicator()
    return kept["told"], kept["over"].whole_bytes, len(result["history"])


ENGINES = [("one", "changes"), *(slow(engine, "changes") for engine in ("fsdp2", "ddp", "zero3"))]
ENGINES += [slow(engine, "whole") for engine in ("one", "ddp", "zero3", "fsdp2")]


@pytest.mark.parametrize("engine, kind", ENGINES)
def test_the_server_computes_what_the_trainer_does_after_every_hand_over(ranks, server, tmp_path, engine, kind):
    tiny_llama(**SHAPES).save_pretrained(tmp_path / "model")
    ports = server(tmp_path / "model")
    world = 1 if engine == "one" else 2
    told, whole, moves = ranks(world, train_and_hand_over, engine, RUN, ports, kind)[0]
    assert len(told) == RUN.steps and moves >= 6
    assert max(far for _, far in told) < 1e-5
    sizes = [size for size, _ in told]
    if kind == "whole":
        assert set(sizes) == {whole}
    else:
        assert sizes[0] == whole and max(sizes[1:]) < whole / 10


@pytest.mark.parametrize("config", [{"modules_to_save": ["norm", "embed_tokens"]}, {"output_rank_factor": 0.25}], ids=str)
def test_what_trains_in_full_is_handed_over_too(config):
    config = LoSiAConfig(rank_factor=0.25, period=2, **config)
    model = get_losia_model(tiny_llama(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-2), lr=1e-2)
    losia = LoSiA(model, optimizer, config)
    plain, over = tiny_llama(), HandOver(losia)
    for step in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        if step != 2:  # a move lies between two hand-overs
            receive(dict(plain.named_parameters()), over.changes())
            expected = model.eval()(input_ids=IDS).logits
            torch.testing.assert_close(plain.eval()(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
            model.train()
    assert over.total_bytes > over.bytes > 0


class LoSiAGRPO(LoSiATrainerMixin, GRPOTrainer):
    """GRPOTrainer that trains subnets."""


class Generation(VLLMGeneration):
    """TRL's own, which generates with the weights of the server: greedily, by its logits."""

    def _init_vllm(self):
        self.vllm_client = Client(
            base_url=self.server_base_url, group_port=self.group_port, connection_timeout=self.server_timeout
        )
        self.vllm_client.init_communicator()
        self.far = []

    def generate(self, prompts, *_, **__):
        with torch.no_grad():
            ids = torch.tensor([[3, 4, 5, 6]])
            own = self.model.eval()(input_ids=ids, use_cache=False).logits
        self.model.train()
        self.far.append((torch.tensor(self.vllm_client.logits(ids.tolist())) - own).abs().max().item())
        answers = []
        for place, prompt in enumerate(prompts):
            best = torch.tensor(self.vllm_client.logits([prompt])[0][-1]).argmax()
            answers.append([int(best), 5 + place])
        return prompts, answers, [[[-1.0], [-1.0]] for _ in prompts], None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["changes", "whole"])
def test_grpo_of_trl_generates_with_fresh_weights(server, tmp_path, monkeypatch, kind):
    model = save_tiny_model(tmp_path / "model")
    ports = server(model)
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Generation)
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_vllm_available", lambda *_, **__: True, raising=False)
    settings = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 4}
    settings |= {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 2, "learning_rate": 1e-2}
    settings |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{ports[0]}"}
    settings |= {"vllm_group_port": ports[1], "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False}
    with fresh_accelerate(), without_vllm():
        trainer = LoSiAGRPO(
            model=model,
            args=GRPOConfig(**settings),
            reward_funcs=lambda completions, **_: [float(place % 2) for place in range(len(completions))],
            train_dataset=Dataset.from_list([{"prompt": "w1 w2"}] * 8),
            losia_config=LoSiAConfig(rank_factor=0.25, period=2),
            hand_over=kind,
        )
        trainer.train()
        assert len(trainer.vllm_generation.far) == 4 and max(trainer.vllm_generation.far) < 1e-5
        sent = [entry["losia/handed_over_gb"] * 1e9 for entry in trainer.state.log_history if "loss" in entry]
        whole = pytest.approx(trainer.hand_over.whole_bytes)
        assert [size == whole for size in sent] == ([True] * 4 if kind == "whole" else [True, False, False, False])
        trained = AutoModelForCausalLM.from_pretrained(model).state_dict()
        moved = [n for n, p in trainer.losia.model.named_parameters() if n in trained and not torch.equal(p, trained[n])]
        assert moved
        trainer.vllm_generation.vllm_client.close_communicator()
        trainer.losia.detach()


def test_what_a_hand_over_cannot_be_is_said(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    made = {"model": tiny_llama(), "args": GRPOConfig(**settings), "reward_funcs": lambda completions, **_: [0.0]}
    with fresh_accelerate(), pytest.raises(ConfigError, match="hand_over='some': give 'whole'.*'changes'"):
        LoSiAGRPO(**made, train_dataset=[{"prompt": "w1"}], losia_config=LoSiAConfig(), hand_over="some")
    with pytest.raises(UnsupportedError, match="use_vllm=True in SimpleNamespace, which sends weights in a way of its own"):
        take_over(SimpleNamespace(args=SimpleNamespace(use_vllm=True)), "whole")
    colocated = SimpleNamespace(vllm_generation=SimpleNamespace(mode="colocate", sync_weights=None))
    with pytest.raises(UnsupportedError, match="needs vllm_mode='server'"):
        take_over(colocated, "changes")
