"""The plan's peak and the peak measured on fake tensors agree: real model classes, real FSDP2, real subnets."""

import json
from dataclasses import replace

import pytest
import torch.distributed as dist

from losia_dist import LoSiAConfig
from losia_dist.cli.main import main
from losia_dist.errors import ConfigError
from losia_dist.tools.plan.memory import plan_memory
from losia_dist.tools.plan.shapes import find_shape
from losia_dist.tools.plan.simulation import simulate
from losia_dist.tools.plan.workload import GB, Cluster, Workload
from tests.support.cases import slow


def compared(model: str, gpus: int, layers: int | None, **settings) -> tuple[int, int]:
    """(planned, simulated) peak bytes of a model, cut to some layers unless None."""
    shape = find_shape(model)
    nodes = max(1, gpus // 8)
    cluster = Cluster(nodes=nodes, gpus_per_node=gpus // nodes)
    workload = Workload(shape if layers is None else replace(shape, layers=layers), cluster, **settings)
    return plan_memory(workload).peak, simulate(workload)


CASES = [
    ("llama-2-70b", 4, {"sequence": 4096}),
    slow("llama-2-70b", 64, {"sequence": 4096, "method": "full"}),
    ("llama-2-70b", 4, {"sequence": 4096, "method": "lora", "checkpointing": False}),
    slow("qwen2.5-7b", 4, {"sequence": 2048, "accumulation": 2, "config": LoSiAConfig(layers_per_slot=2)}),
    ("qwen3-0.6b", 2, {"sequence": 1024, "micro_batch": 2, "checkpointing": False}),
    ("qwen3-0.6b", 2, {"sequence": 1024, "method": "full"}),
    ("llama-2-7b", 4, {"sequence": 2048, "engine": "hsdp", "shard_ranks": 2}),
    ("llama-2-70b", 4, {"sequence": 1024, "config": LoSiAConfig(selection="random")}),
    # The fullest moments of short rows: two full gradients of a localizing layer, and the first layer's forward.
    ("llama-2-70b", 4, {"sequence": 1024, "checkpointing": False}),
    ("qwen3-8b", 8, {"sequence": 1024}),
]


@pytest.mark.parametrize("model, gpus, settings", CASES)
def test_plan_and_simulation_agree_within_5_percent(model, gpus, settings):
    planned, simulated = compared(model, gpus, 3, **settings)
    assert planned == pytest.approx(simulated, rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "model, gpus, method",
    [("llama-2-70b", 4, "losia"), ("llama-2-70b", 64, "full"), ("llama-3-8b", 8, "losia"), ("qwen2.5-32b", 8, "lora")],
)
def test_plan_and_simulation_agree_at_real_size(model, gpus, method):
    planned, simulated = compared(model, gpus, None, sequence=4096, method=method)
    assert planned == pytest.approx(simulated, rel=0.05)
    if model == "llama-2-70b" and method == "losia":
        assert simulated < 0.75 * 80 * GB  # four GPUs are enough, with margin


def test_the_command_reports_the_simulated_peak(capsys, tmp_path):
    replace(find_shape("qwen3-0.6b"), layers=2).configuration().save_pretrained(tmp_path)
    words = ["plan", "--model", str(tmp_path), "--gpus-per-node", "2", "--engine", "fsdp2", "--sequence-length", "256"]
    assert main([*words, "--simulate", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["peak_bytes_per_gpu"] == record["simulated_peak_bytes_per_gpu"] != record["planned_peak_bytes_per_gpu"]
    assert not dist.is_initialized()


def simulate_as_a_rank() -> str:
    workload = Workload(replace(find_shape("qwen3-0.6b"), layers=1), Cluster(gpus_per_node=2), sequence=64)
    with pytest.raises(ConfigError) as refused:
        simulate(workload)
    return str(refused.value)


def test_a_rank_of_a_real_group_does_not_simulate(ranks):
    assert all("a simulation needs a process of its own" in said for said in ranks(2, simulate_as_a_rank))
