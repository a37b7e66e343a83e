"""`losia-dist plan --quantization`: what a base in fewer bits takes, against a model that was quantized."""

import json
from dataclasses import replace

import pytest

from losia_dist import Drawn, LoSiAConfig, get_losia_model
from losia_dist.cli.main import main
from losia_dist.errors import ConfigError
from losia_dist.sharding.resolve import resolve_parameters
from losia_dist.subnet.access import write_back
from losia_dist.subnet.convert import find_sites
from losia_dist.subnet.packed import packed_weights
from losia_dist.tools.plan.costs import plan_traffic
from losia_dist.tools.plan.memory import plan_memory
from losia_dist.tools.plan.quantized import dense_bytes
from losia_dist.tools.plan.shapes import find_shape, shape_of
from losia_dist.tools.plan.workload import GB, Cluster, Workload
from tests.support.families import tiny_model
from tests.support.models import tiny_llama
from tests.support.quantized import quantize

ONE = Cluster(nodes=1, gpus_per_node=1)
CONFIG = LoSiAConfig(rank_factor=0.125, selection=Drawn())


LLAMA = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
MIXTURE = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 6, "head_dim": 64}


@pytest.mark.parametrize(
    "form, model",
    [
        ("nf4:double", lambda: tiny_llama(**LLAMA)),
        ("int8", lambda: tiny_llama(**LLAMA)),
        ("nf4:double:experts", lambda: tiny_model("qwen3_moe", **MIXTURE)),
    ],
)
def test_planned_weights_and_overlay_are_those_of_a_quantized_model(form, model):
    model = model()
    planned = Workload(
        shape_of(model.config, "tiny"), ONE, engine="ddp", sequence=32, config=CONFIG, quantization=form.split(":")[0]
    )
    quantize(model, form)
    get_losia_model(model, CONFIG)
    access, layers = resolve_parameters(model), packed_weights(model)
    for site in find_sites(model):
        write_back(access, site, site.row_index, site.col_index, site.subnet.data * 1.1)
    codes = {id(layer.weight) for layer in layers.values()}
    others = sum(2 * p.numel() for n, p in model.named_parameters() if id(p) not in codes and "subnet" not in n)
    held = sum(layer.weight.nbytes + sum(s.nbytes for s in layer.packed.scales()) for layer in layers.values())
    left = sum(one.codes.nbytes + one.scales.nbytes for layer in layers.values() for one in layer.packed.overlay.read())
    parts = plan_memory(planned).parts
    assert parts["weights"] == pytest.approx(others + held, rel=0.01)
    assert parts["overlay"] == pytest.approx(left, rel=0.01)


@pytest.mark.parametrize("model", ["llama-2-70b", "llama-3.3-70b"])
def test_70b_in_4_bits_fits_one_gpu_of_80_gb_and_not_in_bf16(model):
    asked = {"engine": "ddp", "sequence": 4096, "config": CONFIG}
    shape = find_shape(model)
    assert plan_memory(Workload(shape, ONE, quantization="nf4", **asked)).total < 80 * GB
    assert plan_memory(Workload(shape, ONE, **asked)).total > 150 * GB


def test_qwen3_235b_in_4_bits_fits_four_gpus_of_80_gb_and_not_in_bf16():
    shape, cluster = find_shape("qwen3-235b-a22b"), Cluster(nodes=1, gpus_per_node=4)
    asked = {"engine": "fsdp2", "sequence": 4096, "config": CONFIG}
    found = plan_memory(Workload(shape, cluster, quantization="nf4", **asked))
    assert found.total < 80 * GB and found.parts["weights"] < 40 * GB
    assert plan_memory(Workload(shape, cluster, **asked)).total > 120 * GB


def test_all_experts_of_a_weight_are_made_dense_together():
    shape = find_shape("qwen3-235b-a22b")
    largest = max(w.elements for _, layer in shape.kinds for w in layer.weights)
    workload = Workload(shape, Cluster(nodes=1, gpus_per_node=4), engine="fsdp2", config=CONFIG, quantization="nf4")
    assert dense_bytes(workload) == 2 * largest == 2 * 128 * 2 * 1536 * 4096


def test_ranks_that_share_the_base_share_what_subnets_leave():
    shape = find_shape("qwen3-235b-a22b")
    asked = {"shape": shape, "config": CONFIG, "quantization": "nf4"}
    one = plan_memory(Workload(cluster=ONE, engine="ddp", **asked)).parts["overlay"]
    four, sixteen = (Cluster(nodes=nodes, gpus_per_node=4) for nodes in (1, 4))
    assert plan_memory(Workload(cluster=four, engine="zero2", **asked)).parts["overlay"] == one
    for engine in ("fsdp2", "zero3"):
        assert plan_memory(Workload(cluster=four, engine=engine, **asked)).parts["overlay"] == one // 4
    assert plan_memory(Workload(cluster=sixteen, engine="hsdp", **asked)).parts["overlay"] == one // 4
    # It is gathered in forward, recomputation and backward: all but a rank's own part.
    nothing = {**asked, "config": replace(CONFIG, retired="stochastic")}
    sent = [plan_traffic(Workload(cluster=four, engine="fsdp2", **settings)).weights for settings in (asked, nothing)]
    assert sent[0] - sent[1] == pytest.approx(3 * one * 3 / 4, rel=1e-3)


def test_what_subnets_leave_grows_up_to_one_difference_of_the_whole():
    workload = Workload(find_shape("llama-2-70b"), ONE, engine="ddp", config=CONFIG, quantization="nf4")
    left = [plan_memory(workload, cycles).parts["overlay"] for cycles in (1, 2, 64, 100)]
    assert left[1] == pytest.approx(2 * left[0]) and left[2] == left[3] == pytest.approx(64 * left[0])
    decoder = sum(count * w.elements for count, layer in workload.shape.kinds for w in layer.weights)
    assert left[3] == pytest.approx(0.53 * decoder, rel=0.01)


@pytest.mark.parametrize(
    "more, warns",
    [
        ("", True),
        ("--steps 20000", False),
        ("--steps 20000 --period 10", True),
        ("--gpu-memory 141", False),
        ("--losia_config {stochastic}", False),
    ],
)
def test_a_plan_says_how_far_what_subnets_leave_will_grow_and_warns_where_it_will_not_fit(capsys, tmp_path, more, warns):
    file = tmp_path / "stochastic.yaml"
    file.write_text("rank_factor: 0.125\nselection: random\nretired: stochastic\n")
    line = "plan --model llama-3.3-70b --gpus-per-node 1 --sequence-length 4096 --quantization nf4 --selection random "
    assert main((line + more.format(stochastic=file)).split()) == 0
    text = capsys.readouterr().out
    assert ("WARNING: it fits for 13 cycles" in text and "set retired: stochastic" in text) == warns
    assert ("at most 36.4 GB (from cycle 64 on)" in text) == ("stochastic" not in more)
    assert main((line + "--json " + more.format(stochastic=file)).split()) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"]
    growth = record["overlay_growth"]
    assert (growth is None) == ("stochastic" in more)
    if growth is not None:
        assert growth["outgrows"] == warns
        assert growth["fitting_cycles"] == (None if "141" in more else 13)
    if more == "--steps 20000":
        assert growth["cycles"] == 3 and growth["of_run"] == pytest.approx(3 * growth["one_cycle"])


def test_a_layer_is_gathered_in_its_codes():
    shape, cluster = find_shape("llama-2-70b"), Cluster(nodes=1, gpus_per_node=4)
    in_bf16, in_codes = (plan_memory(Workload(shape, cluster, config=CONFIG, quantization=form)) for form in (None, "nf4"))
    assert in_codes.parts["gathered"] < 0.5 * in_bf16.parts["gathered"]
    assert in_codes.parts["weights"] < 0.35 * in_bf16.parts["weights"]


def test_the_command_shows_qlora_beside_it_and_full_fine_tuning_in_bf16(capsys):
    line = "plan --model llama-2-7b --gpus-per-node 1 --quantization nf4 --selection random --compare --json"
    assert main(line.split()) == 0
    record = json.loads(capsys.readouterr().out)
    found = {"losia": record, **record["compared"]}
    assert [found[name]["quantization"] for name in ("losia", "lora", "full")] == ["nf4", "nf4", None]
    assert found["full"]["memory"]["weights"] > 3 * found["lora"]["memory"]["weights"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantization": "nf3"}, "--quantization nf3: give one of nf4, fp4, int8, fp8"),
        ({"config": LoSiAConfig(retired="int8")}, "retired: int8 is of a quantized base: give --quantization"),
        ({"quantization": "nf4", "method": "full"}, "codes cannot train in full"),
        ({"quantization": "int8", "model": "qwen3-30b-a3b"}, "experts in fused weights, which bitsandbytes does not.*use nf4"),
    ],
)
def test_what_cannot_be_quantized_is_refused(settings, message):
    shape = find_shape(settings.pop("model", "llama-2-7b"))
    with pytest.raises(ConfigError, match=message):
        Workload(shape, ONE, engine="ddp", **{"config": CONFIG, **settings})


def test_a_run_file_has_it(tmp_path):
    line = f"plan --model llama-2-7b --gpus-per-node 1 --quantization nf4 --selection random --output {tmp_path}"
    assert main(line.split()) == 0
    assert "quantization: nf4" in (tmp_path / "run.yaml").read_text()
