"""`losia-dist plan` by formulas: sizes, memory, traffic, schedule, what it recommends, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from losia_dist import Drawn, Located, LoSiAConfig, get_losia_model
from losia_dist.cli.main import main
from losia_dist.formulas import cycle_steps, layers_per_slot_for
from losia_dist.subnet.convert import find_sites
from losia_dist.tools.plan.costs import plan_traffic
from losia_dist.tools.plan.measured import layer_activations
from losia_dist.tools.plan.memory import plan_memory, sizes
from losia_dist.tools.plan.shapes import BUILT_IN, find_shape
from losia_dist.tools.plan.tables import describe
from losia_dist.tools.plan.workload import GB, Cluster, Workload
from losia_dist.tools.plan.workload_plan import make_plan, recommend
from tests.support.models import tiny_llama

# Parameters as their makers count them.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}

START = Located(start="importance")


def workload(model: str = "llama-2-70b", gpus: int = 4, **settings) -> Workload:
    nodes = max(1, gpus // 8)
    cluster = settings.pop("cluster", None) or Cluster(nodes=nodes, gpus_per_node=gpus // nodes)
    return Workload(find_shape(model), cluster, **{"sequence": 4096, **settings})


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_shapes_have_the_published_sizes(name):
    assert find_shape(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", ["llama-3.2-1b", "mistral-nemo-12b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-4b", "qwen3-32b"])
def test_a_shape_is_the_model_that_transformers_makes_of_it(name):
    shape = replace(BUILT_IN[name], layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.configuration())
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    asked = workload(name, config=LoSiAConfig(rank_factor=(0.25, 0.0625), output_rank_factor=0.125))
    layers = find_sites(get_losia_model(model, asked.config))
    found = sizes(replace(asked, shape=shape))
    assert sum(layer.subnet.numel() for layer in layers) == found.all_trained(2)
    assert sum(layer.row_index.numel() + layer.col_index.numel() for layer in layers) == found.indices


def test_a_local_directory_gives_its_own_shape(tmp_path):
    shape = replace(BUILT_IN["qwen3-0.6b"], layers=3)
    shape.configuration().save_pretrained(tmp_path)
    found = find_shape(str(tmp_path))
    assert replace(found, name=shape.name, settings=None, source=None) == shape


def test_losia_fits_70b_on_four_gpus_with_margin_and_full_fine_tuning_does_not():
    losia, full = make_plan(workload(method="losia")), make_plan(workload(method="full"))
    assert losia.fits and losia.memory.total < 0.8 * 80 * GB
    assert not full.fits
    assert not make_plan(workload(method="full", gpus=16)).fits
    assert make_plan(workload(method="full", gpus=64)).fits
    # The optimizer's state of the subnets, over all ranks: 12 bytes for each of 1.07 B elements.
    state = 4 * (losia.memory.parts["masters"] + losia.memory.parts["moments"])
    assert state == pytest.approx(12.83e9, rel=1e-3)


def test_memory_falls_with_ranks_where_the_engine_shards_and_grows_with_what_is_asked():
    def parts(**settings):
        return plan_memory(workload("llama-2-7b", sequence=2048, **settings)).parts

    for engine in ("fsdp2", "zero3"):
        assert parts(engine=engine, gpus=8)["weights"] == parts(engine=engine, gpus=4)["weights"] // 2
    assert parts(engine="ddp", gpus=8)["weights"] == parts(engine="zero2", gpus=4)["weights"] == 2 * 6_738_415_616
    assert parts(engine="zero2", gpus=8)["moments"] == parts(engine="ddp", gpus=8)["moments"] // 8
    hsdp = parts(engine="hsdp", gpus=8, shard_ranks=4)
    assert hsdp["weights"] == parts(gpus=4)["weights"]
    assert hsdp["importance"] < parts(gpus=4)["importance"]  # rows are cut over all ranks
    assert parts(checkpointing=False)["activations"] > 5 * parts()["activations"]
    four = parts(config=LoSiAConfig(layers_per_slot=4))["importance"]
    assert 3.5 * parts()["importance"] < four < 4 * parts()["importance"]  # one whole gradient under way, of any number
    assert parts(method="lora", accumulation=2)["importance"] == 0
    located = LoSiAConfig(selection=START)
    assert parts(config=located) == parts()
    # Inputs of q, k, v, of gate and up, and of down, in place of their columns, and of attention's output beside its columns.
    whole, columns = 2 * (2 * 4096 + 11008), 2 * (6 * 4096 + 11008) // 8
    kept = [parts(config=config, checkpointing=False)["activations"] for config in (located, LoSiAConfig())]
    assert kept[0] - kept[1] == pytest.approx(31 * 2048 * (whole - columns), rel=0.01)  # one layer localizes anyway
    offloaded = plan_memory(workload("llama-2-7b", engine="zero3", offload="all"))
    assert offloaded.parts["weights"] == offloaded.parts["moments"] == 0
    assert offloaded.host == pytest.approx(2 * 6_738_415_616 + 14 * sizes(workload("llama-2-7b")).all_trained(32), rel=0.01)


def test_gradient_traffic_is_a_64th_and_stays_inside_the_node_under_hsdp():
    losia, full = (plan_traffic(workload(gpus=16, method=method)) for method in ("losia", "full"))
    assert full.gradients / losia.gradients == pytest.approx(64.5, rel=0.01)
    inside = plan_traffic(workload(gpus=16, engine="hsdp"))
    assert inside.between_nodes < losia.between_nodes / 20


def test_operations_are_those_of_the_floor():
    """Forward and gradients of activations, 2 p^2 for the subnets and 2 / L for the layer that localizes."""
    compute = make_plan(workload(checkpointing=False)).compute
    shape = find_shape("llama-2-70b")
    body = 2.0 * 4096 * shape.active_weights
    assert compute.recomputed == 0
    assert compute.weights == pytest.approx(body * (1 / 64 + 1 / 80 * (1 - 1 / 64)), rel=1e-3)


@pytest.mark.parametrize("steps, groups, period", [(1000, 80, 100), (2400, 32, 75), (350, 40, 100), (8000, 80, 100)])
def test_the_advised_layers_per_slot_complete_a_cycle_and_one_fewer_do_not(steps, groups, period):
    advised = layers_per_slot_for(steps, groups, period)
    assert cycle_steps(groups, period, advised) < steps  # what is located with the last step would never train
    assert advised == 1 or cycle_steps(groups, period, advised - 1) >= steps
    assert layers_per_slot_for(period, groups, period) is None


def test_the_recommended_engine_is_the_fastest_that_fits():
    small = recommend(workload("qwen2.5-0.5b", gpus=8, sequence=1024))
    assert not small.workload.checkpointing and small.workload.offload == "none"
    large = recommend(workload(gpus=4))
    assert large.fits and large.workload.engine in ("fsdp2", "zero3") and large.workload.offload == "none"
    tight = recommend(workload(cluster=Cluster(gpus_per_node=4, memory=30 * GB)))
    assert tight.workload.offload == "all"
    assert recommend(workload(cluster=Cluster(gpus_per_node=2, memory=12 * GB), micro_batch=8)) is None


BASE = ("plan", "--model", "llama-2-70b", "--gpus-per-node", "4", "--engine", "fsdp2", "--sequence-length", "4096")


def run(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_the_command_prints_one_record(capsys):
    record = json.loads(run(capsys, *BASE, "--json", "--steps", "1000", "--compare"))
    assert record["fits"] is True
    assert record["peak_bytes_per_gpu"] == sum(record["memory"].values()) - record["reserve_bytes"]
    assert record["schedule"] | {"cycle_steps": 8000, "recommended_layers_per_slot": 9} == record["schedule"]
    assert record["compared"]["full"]["fits"] is False
    assert record["disk_bytes"]["step"] == pytest.approx(12.85e9, rel=1e-3)


def test_the_command_prints_tables(capsys):
    text = run(capsys, *BASE, "--compare", "--steps", "1000")
    assert "| fits" in text and "NO" in text
    assert "for one full cycle use layers_per_slot: 9" in text and "Half the period" not in text
    assert "989 TFLOP/s at 40%" in text
    assert "Recommended: " in text


def test_without_an_engine_one_is_chosen_that_keeps_what_was_asked_for(capsys):
    words = ("plan", "--model", "qwen2.5-0.5b", "--sequence-length", "1024", "--json")
    assert json.loads(run(capsys, *words))["checkpointing"] is False
    assert json.loads(run(capsys, *words, "--checkpointing", "on"))["checkpointing"] is True
    assert json.loads(run(capsys, *words, "--offload", "all"))["offload"] == "all"


def test_settings_come_from_a_file_and_options_override_them(capsys, tmp_path):
    (tmp_path / "losia.yaml").write_text("period: 50\nlayers_per_slot: 4\n")
    words = (*BASE, "--json", "--losia_config", str(tmp_path / "losia.yaml"), "--period", "20")
    assert json.loads(run(capsys, *words))["schedule"]["cycle_steps"] == 400
    (tmp_path / "losia.yaml").write_text("layers_per_slot: auto\ncycles: 2\n")
    schedule = json.loads(run(capsys, *words[:-2], "--steps", "2001"))["schedule"]
    assert schedule["layers_per_slot"] == schedule["recommended_layers_per_slot"] == 8
    text = run(capsys, *(word for word in words[:-2] if word != "--json"), "--steps", "2001")
    assert "for 2 full cycles use layers_per_slot: 8" in text and "Half the period and half as many layers a slot" in text


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "llama-2-71b"], "llama-2-71b: no built-in shape.*did you mean .*llama-2-70b"),
        (["--model", "xyz"], "built in: llama-2-7b"),
        (["--model", "{tmp}"], "the directory has no config.json"),
        (["--model", "{tmp}/gpt2"], "'gpt2' model; plans cover the dense decoders llama"),
        (["--nodes", "0"], "--nodes 0: at least 1"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: at least 1"),
        (["--gpus-per-node", "1"], "--engine fsdp2 needs at least 2 GPUs"),
        (["--gpu-memory", "3"], "--gpu-memory 3 with --reserve 4"),
        (["--gpu-memory", "nan"], "--gpu-memory nan"),
        (["--gpu", "tpu"], "--gpu tpu: give one of a100"),
        (["--efficiency", "0"], "--efficiency 0: a share"),
        (["--engine", "fsdp1"], "--engine fsdp1: give one of ddp"),
        (["--engine", "hsdp"], "hsdp with 4 ranks sharing one copy of the model on 4 GPUs"),
        (["--engine", "hsdp", "--shard-ranks", "3"], "hsdp with 3 ranks .* divide it"),
        (["--shard-ranks", "2"], "--shard-ranks 2 belongs to --engine hsdp"),
        (["--offload", "optimizer"], "--offload optimizer with --engine fsdp2: possible are none, all"),
        (["--method", "dora"], "--method dora: give one of losia"),
        (["--rank-factor", "0"], "rank_factor=0.0: a share in \\(0, 1\\]"),
        (["--rank-factor", "1.5"], "rank_factor=1.5: a share"),
        (["--rank-factor", "0.0001"], "leaves self_attn.q_proj .* no row or column"),
        (["--rank-factor", "0.1", "0.1", "0.1"], "give one number, or a pair"),
        (["--sequence-length", "4097"], "--sequence-length 4097: llama-2-70b was made for 2 to 4096"),
        (["--sequence-length", "0"], "--sequence-length 0"),
        (["--micro-batch", "0"], "--micro-batch 0: at least 1"),
        (["--method", "lora", "--lora-rank", "2000"], "--lora-rank 2000: at most 1024"),
        (["--period", "0"], "period=0: a whole number of at least 1"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--simulate", "--engine", "zero3"], "--simulate follows fsdp2 and hsdp without offload"),
        (["--losia_config", "{tmp}/embeddings.yaml"], "a plan covers target_modules='all-linear'"),
        (["--losia_config", "{tmp}/pattern.yaml"], "rank_pattern out .* rank_factor to the largest"),
        (["--losia_config", "{tmp}/auto.yaml"], "layers_per_slot='auto' follows .* give --steps"),
        (["--losia_config", "{tmp}/auto.yaml", "--steps", "90"], "90 steps are too few for 1 cycle.* at least 101"),
        (["--method", "lora", "--output", "{tmp}/out"], "--output with --method lora"),
        (["--nodes", "two"], "invalid int value: 'two'"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(capsys, tmp_path, words, said):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "embeddings.yaml").write_text("train_embeddings: true\n")
    (tmp_path / "pattern.yaml").write_text("rank_pattern: {down_proj: 0.25}\n")
    (tmp_path / "auto.yaml").write_text("layers_per_slot: auto\n")
    words = [word.format(tmp=tmp_path) for word in words]
    try:
        code = main([*BASE, *words])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and len(err.splitlines()) == 1 and err.startswith("error: "), (code, out, err)
    assert re.search(said, err), err


def test_a_hub_name_without_a_network_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*BASE, "--model", "nobody/no-such-model"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "Without a network take a local directory or a built-in shape" in err


def test_a_warm_start_keeps_and_sends_sums_alone():
    shape = find_shape("llama-2-70b")
    square = make_plan(workload(config=LoSiAConfig(selection=START))).record()["warm_start"]
    tall = make_plan(workload(config=LoSiAConfig(selection=START, rank_factor=[1.0, 1 / 64]))).record()["warm_start"]
    assert make_plan(workload(config=LoSiAConfig())).record()["warm_start"] is None
    assert (square["passes"], tall["passes"]) == (2, 1)
    assert square["sums_bytes"] == 8 * 80 * sum(w.m + w.n for w in shape.fullest.weights)
    assert tall["sums_bytes"] == 8 * 80 * sum(w.n for w in shape.fullest.weights)
    assert square["seconds"] == pytest.approx(2 * tall["seconds"], rel=1e-6)
    assert square["sums_bytes"] < 0.2e9 and square["largest_gradient_bytes"] == 2 * 8192 * 28672


def test_finding_outliers_is_one_forward_pass():
    shape = find_shape("llama-2-70b")
    drawn = LoSiAConfig(selection=Drawn(outlier_limit=4))
    plan = make_plan(workload(config=drawn))
    found, located = (
        plan.record()["warm_start"],
        make_plan(workload(config=LoSiAConfig(selection=START))).record()["warm_start"],
    )
    assert found["passes"] == 1 and found["largest_gradient_bytes"] == 0
    assert found["sums_bytes"] == 8 * 80 * sum(w.n for w in shape.fullest.weights)
    assert found["flops"] < 0.2 * located["flops"]
    assert plan.peak == make_plan(workload(config=LoSiAConfig(selection="random"))).peak
    assert "forward alone" in describe([plan], None)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_drawn_subnets_cost_nothing_beyond_the_subnets_step(engine):
    drawn, greedy = (make_plan(workload(engine=engine, config=LoSiAConfig(selection=s))) for s in ("random", "greedy"))
    assert drawn.traffic.localization == drawn.memory.parts["importance"] == 0 < greedy.traffic.localization
    assert drawn.peak < greedy.peak
    one_layer = 2.0 * 4096 * find_shape("llama-2-70b").active_weights / 80
    assert greedy.compute.total - drawn.compute.total == pytest.approx(one_layer * (1 - 1 / 64), rel=1e-3)
    assert drawn.record()["disk_bytes"]["importance_inside_a_slot"] == 0
    assert drawn.traffic.gradients == greedy.traffic.gradients


def test_importance_from_some_steps_costs_their_share_of_whole_gradients():
    def planned(selection):
        return make_plan(workload(engine="ddp", config=LoSiAConfig(selection=selection)))

    drawn, every, some = (planned(s) for s in (Drawn(), Located(), Located(importance_steps=8)))
    assert some.traffic.localization == pytest.approx(0.08 * every.traffic.localization)
    assert some.compute.weights - drawn.compute.weights == pytest.approx(0.08 * (every.compute.weights - drawn.compute.weights))
    assert some.peak == every.peak  # such a step is still the fullest one


def test_fp8_products_take_copies_of_what_they_multiply_and_are_timed_as_bf16s():
    plain = workload("qwen3-8b")
    rounded = replace(plain, config=LoSiAConfig(weight_products="fp8"))
    ours, theirs = layer_activations(rounded, True), layer_activations(plain, True)
    # Backward begins with down_proj's dx, of dy [4096, 4096] and W [4096, 12288] in a byte each.
    assert ours.beyond[0] - theirs.beyond[0] == pytest.approx(4096 * 4096 + 4096 * 12288, abs=64)
    assert ours.saved == theirs.saved
    plans = [make_plan(one) for one in (plain, rounded)]
    assert plans[0].seconds == plans[1].seconds
    told = "FP8 products are timed as bf16's."
    assert told in describe(plans[1:], None) and told not in describe(plans[:1], None)


def test_the_command_says_nothing_of_averages_where_subnets_are_drawn(capsys, tmp_path):
    file = tmp_path / "losia.yaml"
    file.write_text("selection: random\nlayers_per_slot: 4\n")
    words = ["plan", "--model", "llama-2-7b", "--engine", "fsdp2", "--losia_config", str(file)]
    said = run(capsys, *words)
    assert "4 a slot" in said and "averages" not in said.split("Drawing subnets anew")[1]
    file.write_text("layers_per_slot: 4\n")
    assert "averages" in run(capsys, *words).split("Re-localization")[1]


def test_what_nobody_gave_fits_the_model(capsys, tmp_path):
    """A model made for 64 tokens, whose smallest side is below the usual rank of LoRA."""
    tiny_llama(max_position_embeddings=64).config.save_pretrained(tmp_path)
    record = json.loads(run(capsys, "plan", "--model", str(tmp_path), "--rank-factor", "0.5", "--compare", "--json"))
    assert record["sequence_length"] == 64 and record["compared"]["lora"]["trained_parameters"] > 0
    assert main(["plan", "--model", str(tmp_path), "--sequence-length", "2048"]) == 2
    assert "was made for 2 to 64 tokens" in capsys.readouterr().err
