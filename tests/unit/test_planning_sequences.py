"""Plans for long sequences: GPUs that share each, activations that wait on the host, a loss of some tokens at a time."""

from dataclasses import replace

import pytest

from losia_dist import Located, LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.tools.plan.costs import plan_compute, plan_traffic
from losia_dist.tools.plan.launch_files import run_options
from losia_dist.tools.plan.measured import layer_activations
from losia_dist.tools.plan.memory import _logits, checkpoint_bytes
from losia_dist.tools.plan.shapes import find_shape
from losia_dist.tools.plan.workload import Cluster, Workload
from losia_dist.tools.plan.workload_plan import make_plan

SHAPE = find_shape("llama-3.1-70b")
LONG = Workload(SHAPE, Cluster(), engine="zero3", sequence=32768)
SHARED = replace(LONG, sequence_ranks=8)


def test_what_a_gpu_keeps_and_computes_falls_with_the_gpus_that_share_a_sequence():
    assert SHARED.tokens == LONG.tokens // 8 and SHARED.data_ranks == 1
    assert checkpoint_bytes(SHARED) * 8 == checkpoint_bytes(LONG) and _logits(SHARED) * 8 == _logits(LONG)
    assert layer_activations(SHARED).saved == layer_activations(replace(LONG, sequence=4096)).saved
    assert plan_compute(SHARED).total * 8 == pytest.approx(plan_compute(LONG).total)


def test_heads_are_sent_for_tokens_four_times_a_layer_forward_again_and_back():
    tokens, layers, attended, keys = SHARED.tokens, SHAPE.layers, SHAPE.attended, 8 * SHAPE.head_size
    whole = 3 * 2 * tokens * layers * (2 * attended + 2 * keys)
    assert plan_traffic(SHARED).sequence == whole * 7 // 8
    assert plan_traffic(LONG).sequence == 0
    far = replace(SHARED, cluster=Cluster(nodes=2), sequence_ranks=16)
    assert plan_traffic(far).between_nodes > plan_traffic(replace(SHARED, cluster=Cluster(nodes=2))).between_nodes


def test_activations_on_the_host_leave_two_layers_on_the_gpu():
    there, here = make_plan(replace(SHARED, activation_offload=True)), make_plan(SHARED)
    one = checkpoint_bytes(SHARED)
    assert there.memory.host == 8 * SHAPE.layers * one and plan_traffic(there.workload).host == 2 * SHAPE.layers * one
    assert there.memory.total < here.memory.total


def test_a_chunked_loss_has_the_logits_of_a_chunk():
    chunked = replace(LONG, chunked_loss=True)
    assert _logits(chunked) < _logits(LONG) / 30


def test_each_group_of_gpus_localizes_by_itself():
    by_rank = LoSiAConfig(selection=Located(reduction="by_rank"), layers_per_slot=1)
    alone = make_plan(replace(LONG, config=by_rank)).record(1000)["schedule"]["cycle_steps"]
    assert make_plan(replace(SHARED, config=by_rank)).record(1000)["schedule"]["cycle_steps"] == 8 * alone


@pytest.mark.parametrize(
    "change, words",
    [
        ({"engine": "fsdp2"}, "--sequence-parallel 8 is DeepSpeed's"),
        ({"sequence_ranks": 3}, "--sequence-parallel 3: llama-3.1-70b has 64 heads"),
        ({"sequence": 32767}, "--sequence-length 32767 is not divided by --sequence-parallel 8"),
        ({"activation_offload": True, "checkpointing": False}, "--activation-offload keeps what recomputation begins from"),
    ],
)
def test_what_cannot_be_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        replace(SHARED, **change)


def test_the_run_file_that_is_written_asks_for_it(tmp_path):
    options = run_options(replace(SHARED, activation_offload=True, chunked_loss=True), tmp_path)
    asked = {"sequence_parallel": 8, "loss": "chunked", "gradient_checkpointing": "offloaded"}
    assert options.items() >= asked.items()
