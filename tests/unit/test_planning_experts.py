"""`losia-dist plan` for mixtures of experts: sizes, groups, memory beside simulations, operations, and what it refuses."""

import json
import re
from dataclasses import replace

import pytest
from transformers import AutoConfig

from losia_dist import LoSiAConfig
from losia_dist.cli.main import main
from losia_dist.errors import ConfigError
from losia_dist.subnet.convert import find_sites, group_names
from losia_dist.tools.plan.costs import plan_compute, plan_traffic, plan_warm_start
from losia_dist.tools.plan.measured import layer_activations
from losia_dist.tools.plan.memory import plan_memory, sizes
from losia_dist.tools.plan.meta_model import meta_model
from losia_dist.tools.plan.shapes import MIXTURES, find_shape, shape_of
from losia_dist.tools.plan.simulation import simulate
from losia_dist.tools.plan.workload import Cluster, Workload
from losia_dist.tools.plan.workload_plan import make_plan
from tests.support.cases import slow

# Parameters of the published models, without DeepSeek's and GLM's layer for several tokens ahead.
PUBLISHED = {
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_404_352,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "glm-4.5-air": 106_852_245_504,
}
DRAWN, LOCATED = LoSiAConfig(selection="random"), LoSiAConfig()

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 32, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 6, "head_dim": 16},
    "deepseek_v3": {
        "n_routed_experts": 6,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}


def workload(shape, gpus: int = 8, **settings) -> Workload:
    nodes = max(1, gpus // 8)
    shape = find_shape(shape) if isinstance(shape, str) else shape
    return Workload(shape, Cluster(nodes=nodes, gpus_per_node=gpus // nodes), **{"config": DRAWN, "sequence": 1024, **settings})


def tiny(family: str):
    return shape_of(AutoConfig.for_model(family, **{**TINY, **FAMILIES[family]}), family)


@pytest.mark.parametrize("name", MIXTURES)
def test_built_in_mixtures_have_the_published_sizes(name):
    assert find_shape(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [{"selection": "random"}, {"experts_per_slot": 4}], ids=["drawn", "parts"])
def test_sizes_and_groups_are_those_of_the_converted_model(family, config):
    asked = workload(tiny(family), sequence=64, config=LoSiAConfig(rank_factor=0.25, layers_per_slot=2, **config))
    model = meta_model(asked)
    sites, found = find_sites(model), sizes(asked)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == asked.shape.parameters
    assert sum(site.subnet.numel() for site in sites) == found.all_trained(asked.shape.layers)
    assert sum(site.row_index.numel() + site.col_index.numel() for site in sites) == found.indices
    names = group_names(sites)
    assert asked.groups == len(names)
    if asked.config.located is not None:
        last = [site for site in sites if site.group_name in names[-2:]]
        assert [weight.elements for layer in asked.localizing for weight in layer] == [
            site.layout.count * site.shape[0] * site.shape[1] for site in last
        ]
        assert found.localizing == sum(weight.elements for weight in asked.localizing[0])


CASES = [
    ("qwen3-30b-a3b", 3, 8, {}),
    ("qwen3-30b-a3b", 3, 8, {"method": "full"}),
    slow("qwen3-30b-a3b", 3, 8, {"method": "lora", "lora_rank": 16}),
    slow("qwen3-30b-a3b", 3, 8, {"config": LoSiAConfig(experts_per_slot=16, layers_per_slot=13), "sequence": 512}),
    slow("qwen3-30b-a3b", 3, 8, {"config": LOCATED, "checkpointing": False}),
    ("gpt-oss-20b", 3, 8, {"config": LOCATED, "sequence": 512}),
    slow("gpt-oss-20b", 3, 64, {"config": LOCATED}),  # more ranks than experts
    slow("gpt-oss-120b", 3, 8, {}),
    # Shards of 8 experts over 16 ranks are padded, over 8 they are not.
    ("mixtral-8x7b", 3, 16, {}),
    slow("mixtral-8x7b", 3, 16, {"engine": "hsdp", "shard_ranks": 8, "config": LOCATED}),
    slow("mixtral-8x22b", 3, 16, {"method": "full"}),
    slow("deepseek-v3", 6, 64, {"config": LOCATED}),  # layers that differ
    slow("deepseek-v3", 6, 64, {"method": "full"}),
    slow("deepseek-v3", 6, 64, {"method": "lora", "lora_rank": 16}),
    slow("glm-4.5-air", 4, 48, {"config": LOCATED, "accumulation": 3}),
    slow("qwen3-235b-a22b", 3, 24, {"config": LOCATED, "sequence": 4096}),
]


@pytest.mark.parametrize("name, layers, gpus, settings", CASES)
def test_plan_and_simulation_agree_within_5_percent(name, layers, gpus, settings):
    asked = workload(replace(find_shape(name), layers=layers), gpus, **settings)
    assert plan_memory(asked).peak == pytest.approx(simulate(asked), rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name, gpus, settings",
    [
        ("qwen3-30b-a3b", 8, {}),
        ("qwen3-30b-a3b", 8, {"config": LOCATED}),
        ("qwen3-30b-a3b", 8, {"method": "full"}),
        ("qwen3-30b-a3b", 8, {"method": "lora", "lora_rank": 16}),
        ("gpt-oss-20b", 8, {}),
        ("mixtral-8x7b", 8, {}),
    ],
)
def test_plan_and_simulation_agree_at_real_size(name, gpus, settings):
    asked = workload(name, gpus, sequence=4096, **settings)
    assert plan_memory(asked).peak == pytest.approx(simulate(asked), rel=0.05)


@pytest.mark.parametrize("method", ["losia", "lora"])
def test_a_measured_layer_is_what_can_be_counted_by_hand_in_a_dense_one(method):
    """By what autograd keeps of a Qwen3 layer: norms compute in fp32 (4 bytes), everything else is bf16 (2 bytes)."""
    asked = workload("qwen3-8b", method=method)
    hidden, inner, attended, keys, heads, tokens = 4096, 12288, 4096, 1024, 32, 1024
    # Both norms; q, k, v (repeated to all heads, as the mask demands), attention's output and its log-sum-exp; gate, activation
    # and up; norms of q and k.
    saved = 8 * hidden + 8 * attended + 4 * heads + 6 * inner + 4 * (attended + keys)
    columns = 5 * (hidden // 8) + attended // 8 + inner // 8
    # A linear layer keeps the subnet's columns, or its input and what LoRA's first matrix gives.
    saved += 2 * columns if method == "losia" else 4 * hidden + 2 * inner + 2 * 64 * 7
    product = inner if method == "lora" else inner // 8  # which down_proj had kept, and has let go by the fullest moment
    beyond = 2 * hidden + 6 * inner - 2 * product
    found = layer_activations(asked)
    assert found.saved == pytest.approx(tokens * saved, rel=0.03)
    assert found.saved + found.beyond[0] == pytest.approx(tokens * (saved + beyond), rel=0.03)
    assert found.shared == pytest.approx(tokens**2 + 4 * tokens * 128, rel=0.03)  # mask, cosines and sines


def test_operations_are_those_of_the_experts_that_tokens_take_and_traffic_that_of_all():
    shape = find_shape("qwen3-30b-a3b")
    compute = plan_compute(workload(shape, checkpointing=False))
    attention, experts = 2048 * (2 * 4096 + 2 * 512), 8 * 3 * 2048 * 768
    products = 48 * (attention + experts) + 151936 * 2048
    assert compute.forward == 2 * 1024 * products + 4 * 1024 * 1024 * 48 * 4096
    assert compute.weights == pytest.approx(2 * 1024 * 48 * (attention + experts) / 64, rel=1e-3)
    one_part = 64 / 128 * experts  # a part of the experts is half of a layer's
    located = plan_compute(workload(shape, checkpointing=False, config=LOCATED))
    assert located.weights - compute.weights == pytest.approx(2 * 1024 * one_part * 63 / 64, rel=1e-3)
    sent = plan_traffic(workload(shape, gpus=8)).weights
    assert sent == pytest.approx(2 * 2 * shape.parameters * 7 / 8, rel=0.02)
    lora = plan_compute(workload(shape, method="lora", lora_rank=16, checkpointing=False))
    assert lora.weights > 2 * 1024 * 48 * experts  # the whole gradient of each weight is formed


def test_a_warm_start_forms_one_experts_gradient_at_a_time():
    config = LoSiAConfig.preset("7b")
    found = plan_warm_start(workload("qwen3-30b-a3b", config=replace(config, layers_per_slot=1)))
    assert found["largest_gradient_bytes"] == 2 * 2048 * 4096  # q_proj: larger than an expert's matrices
    assert found["sums_bytes"] > 8 * 48 * 128 * (1536 + 2048)


def test_experts_that_do_not_divide_are_padded_where_the_engine_cuts_by_experts():
    def peak(gpus, engine="fsdp2", **settings):
        parts = plan_memory(workload("mixtral-8x7b", gpus, engine=engine, **settings)).parts
        return parts["weights"], parts["gathered"]

    (w8, g8), (w64, g64) = peak(8), peak(64)
    assert w64 > 0.9 * w8 and g64 > 6 * g8  # 8 experts: no rank holds less than one
    assert peak(64, "hsdp", shard_ranks=8) == (w8, g8)
    assert peak(64, "zero3")[0] < w8 / 7
    trained = sizes(workload("mixtral-8x7b", 64))
    assert trained.all_trained(32) == sizes(workload("mixtral-8x7b", 8)).all_trained(32)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_drawn_subnets_of_experts_cost_no_averages_on_any_engine(engine):
    drawn, located = (
        make_plan(workload("qwen3-30b-a3b", engine=engine, config=c, checkpointing=False)) for c in (DRAWN, LOCATED)
    )
    assert drawn.memory.parts["importance"] == drawn.traffic.localization == 0 < located.traffic.localization
    assert drawn.peak < located.peak


def record(capsys, *words: str) -> dict:
    assert main(["plan", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_draws_unless_told_and_counts_parts_as_groups(capsys, tmp_path):
    words = ("--model", "qwen3-30b-a3b", "--engine", "fsdp2", "--steps", "1000", "--lora-rank", "16", "--compare")
    drawn = record(capsys, *words)
    assert drawn["schedule"]["selection"] == "random" and drawn["schedule"]["groups"] == 48
    assert drawn["fits"] and set(drawn["compared"]) == {"full", "lora"}
    assert record(capsys, *words, "--selection", "greedy")["schedule"]["groups"] == 48 * 3
    file = tmp_path / "losia.yaml"
    file.write_text("layers_per_slot: auto\nexperts_per_slot: 32\n")
    located = record(capsys, *words, "--losia_config", str(file))["schedule"]
    assert (located["selection"], located["groups"], located["layers_per_slot"]) == ("greedy", 48 * 5, 27)
    assert record(capsys, "--model", "qwen3-0.6b")["schedule"]["selection"] == "greedy"


def test_a_directory_of_any_family_can_be_planned(capsys, tmp_path):
    AutoConfig.for_model("gpt_oss", **{**TINY, **FAMILIES["gpt_oss"]}).save_pretrained(tmp_path)
    words = ("--model", str(tmp_path), "--sequence-length", "64", "--engine", "fsdp2", "--rank-factor", "0.25")
    found = record(capsys, *words, "--gpus-per-node", "2", "--simulate")
    assert found["planned_peak_bytes_per_gpu"] == pytest.approx(found["simulated_peak_bytes_per_gpu"], rel=0.05)


@pytest.mark.parametrize(
    "family, changed, said",
    [
        ("jetmoe", {}, "\\(jetmoe\\) cannot be planned: .* leave the experts of JetMoeForCausalLM frozen.* Take the built-in"),
        ("longcat_flash", {}, "\\(longcat_flash\\) cannot be planned: .*experts"),
        ("qwen3_moe", {"num_experts_per_tok": None}, "its configuration could not be read .*'num_experts_per_tok'"),
        ("deepseek_v2", {}, "does not say how many experts a token takes; add num_experts_per_tok"),
        ("dbrx", {}, "Transformers builds no causal language model of type 'dbrx'"),
    ],
)
def test_experts_that_cannot_be_planned_are_refused_by_name(capsys, tmp_path, family, changed, said):
    settings = AutoConfig.for_model(family).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**settings, **changed}))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out and len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert re.search(said, err), err


def test_a_factor_too_small_names_the_experts_weight():
    with pytest.raises(ConfigError, match=r"leaves mlp.experts.down_proj \(2048 x 768\) of qwen3-30b-a3b no row or column"):
        workload("qwen3-30b-a3b", config=LoSiAConfig(rank_factor=[1.0, 1 / 800]))
