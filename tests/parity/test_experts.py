"""Mixtures of experts with a subnet in every expert, against the dense reference over two cycles: losses and whole weights to
1e-5, indices and groups equal. Odd numbers of experts, sizes that align to nothing, one expert that no token reaches.
"""

import pytest
import torch

from losia_dist import Drawn, Located, LoSiAConfig, get_losia_model
from losia_dist.formulas import cycle_steps
from losia_dist.subnet.convert import find_sites
from tests.support.cases import grid, slow
from tests.support.compare import assert_same_run
from tests.support.expected import STORED_TRANSPOSED, mixture_targets
from tests.support.families import IDLE, MIXTURES, tiny_model
from tests.support.training import Run, build, reference, train, variant

pytestmark = pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="experts need torch 2.10 or newer")

FAMILIES = [name.removeprefix("mixture:") for name in MIXTURES]
ENGINES = ["one", "ddp", "zero2", "zero3", "fsdp2"]
CONFIG = {"rank_factor": (0.3, 0.2), "output_rank_factor": 0.25, "period": 3}
SHORT = {**CONFIG, "period": 2, "layers_per_slot": 2}
PARTS = {**SHORT, "experts_per_slot": 2}
DRAWN = {**SHORT, "selection": "random", "seed": 5}
MODES = {
    "located": Run(steps=18, config=CONFIG),
    "accumulated": Run(steps=12, accumulation=3, max_grad_norm=0.5, config=SHORT),
    "few tokens": Run(steps=18, batch=2, length=4, config=CONFIG),
    "drawn": Run(steps=12, accumulation=2, max_grad_norm=0.5, config=DRAWN),
    "parts": Run(steps=24, accumulation=2, max_grad_norm=0.5, config=PARTS),
}


def of(family: str, run: Run) -> Run:
    """The same for a family; longer where its model has more layers."""
    steps = {18: 30}.get(run.steps, run.steps) if family == "nemotron_h" else run.steps
    return variant(run, family=f"mixture:{family}", steps=steps)


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of_run(run: Run, **options):
        key = repr((run, options))
        if key not in kept:
            kept[key] = reference(variant(run, checkpointing="off", deepspeed={}), **options)
        return kept[key]

    return of_run


def run_on(ranks, engine: str, run: Run):
    """Results of every rank; one process needs no pool."""
    return [train("one", run)] if engine == "one" else ranks(2, train, engine, run)


def assert_same_experts(result, wanted):
    """The same run, from the same first places, group by group."""
    assert result["first"].keys() == wanted["first"].keys()
    for name, places in wanted["first"].items():
        for ours, theirs, what in zip(result["first"][name], places, ("rows", "columns"), strict=True):
            assert torch.equal(ours.cpu(), theirs), f"first {what} of {name}"
    groups = [(step, wanted["groups"][group]) for step, group, _ in wanted["history"]]
    assert [(step, group) for step, group, _ in result["history"]] == groups
    assert_same_run(result, wanted)


def test_every_run_spans_two_cycles():
    for mode, run in MODES.items():
        for family in FAMILIES:
            run = of(family, run)
            groups = len(mixture_targets(tiny_model(run.family), run.config).groups)
            assert groups > 1 and run.steps >= 2 * cycle_steps(
                groups, run.config["period"], run.config.get("layers_per_slot", 1)
            ), (
                mode,
                family,
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_never_chosen_and_the_others_are(expected, family):
    run = of(family, MODES["located"])
    wanted, idle, start = expected(run), IDLE[family], build(run)
    for key, (name, _, last) in wanted["experts"].items():
        reached = set.union(*wanted["reached"][key])
        assert last % 2 == 1 and idle not in reached and len(reached) > last / 2
        assert torch.equal(wanted["weights"][name][idle], start.get_parameter(name)[idle])
        for before, after in zip(wanted["first"][key], last_places(wanted, key), strict=True):
            assert torch.equal(before[idle], after[idle]), f"{key}: the idle expert has moved"
            assert any(not torch.equal(before[e], after[e]) for e in reached), f"{key}: no expert has moved"


@pytest.mark.parametrize("family", FAMILIES)
def test_with_few_tokens_experts_go_without_in_some_steps_of_a_slot(expected, family):
    run = of(family, MODES["few tokens"])
    wanted, period = expected(run), CONFIG["period"]
    slots = [
        (key, [reached[slot : slot + period] for slot in range(0, run.steps, period)])
        for key, reached in wanted["reached"].items()
        if key in wanted["experts"]
    ]
    assert any(set.union(*slot) != set.intersection(*slot) for _, of_key in slots for slot in of_key)


def last_places(wanted, key):
    return next(chosen[key] for _, _, chosen in reversed(wanted["history"]) if key in chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_speaks_of_one_matrix_and_its_module_holds_the_subnets(family):
    model = get_losia_model(tiny_model(f"mixture:{family}"), LoSiAConfig(**CONFIG))
    wanted = mixture_targets(tiny_model(f"mixture:{family}"), CONFIG)
    sites = {site.name: site for site in find_sites(model) if site.experts is not None}
    assert sites.keys() == wanted.experts.keys()
    for name, site in sites.items():
        count = site.weight.shape[0]
        assert site.experts == (0, count) and site.weight is model.get_parameter(name)
        assert site.weight_is_transposed == (family in STORED_TRANSPOSED)
        m, n = reversed(site.weight.shape[1:]) if site.weight_is_transposed else site.weight.shape[1:]
        assert tuple(site.shape) == (m, n) and not site.weight.requires_grad
        r, c = site.row_index.shape[1], site.col_index.shape[1]
        assert site.row_index.shape[0] == site.col_index.shape[0] == count and site.row_index.dtype == torch.int64
        assert tuple(site.subnet.shape) == (count, r, c) and site.subnet.requires_grad
        module, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        assert getattr(module, f"{last}_subnet") is site.subnet
        assert getattr(module, f"{last}_row_index") is site.row_index and getattr(module, f"{last}_col_index") is site.col_index


def test_parts_are_parameters_and_groups_of_their_own():
    model = get_losia_model(tiny_model("mixture:qwen3_moe"), LoSiAConfig(**PARTS))
    experts = model.model.layers[0].mlp.experts
    assert [experts.get_parameter(f"down_proj_subnet_{part}").shape[0] for part in range(3)] == [2, 2, 1]
    sites = [site for site in find_sites(model) if site.name.startswith("model.layers.0.mlp.experts.down_proj")]
    assert [site.name.removeprefix("model.layers.0.mlp.experts.down_proj") for site in sites] == ["[0:2]", "[2:4]", "[4:5]"]
    assert [site.group_name for site in sites] == [f"model.layers.0.experts{span}" for span in ("[0:2]", "[2:4]", "[4:5]")]
    assert [site.experts for site in sites] == [(0, 2), (2, 4), (4, 5)]


@pytest.mark.parametrize("selection, spans", [("greedy", ["[0:65]", "[65:129]"]), ("random", [])])
def test_auto_takes_as_few_parts_as_keep_a_full_gradient_within_the_limit(selection, spans):
    sizes = {"num_experts": 129, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = tiny_model("qwen3_moe", **sizes)
    model = get_losia_model(model, LoSiAConfig(rank_factor=0.1, selection=selection))
    groups = list(dict.fromkeys(site.group_name for site in find_sites(model)))
    assert groups == ["model.layers.0", *(f"model.layers.0.experts{span}" for span in spans)]


SAMPLE = [f"located-{family}-one" for family in FAMILIES]
SAMPLE += [
    "few tokens-qwen3_moe-one",
    "few tokens-mixtral-one",
    "parts-qwen3_moe-one",
    "accumulated-mixtral-ddp",
    "drawn-gpt_oss-zero2",
    "parts-nemotron_h-one",
]
SAMPLE += ["parts-gpt_oss-fsdp2"]  # ZeRO-3: experts alone, below


@pytest.mark.parametrize("run, family, engine", grid(MODES, FAMILIES, ENGINES, often=SAMPLE))
def test_experts_train_as_the_dense_reference_does(ranks, expected, engine, family, run):
    run = of(family, run)
    for result in run_on(ranks, engine, run):
        assert_same_experts(result, expected(run))


CHECKPOINTED = ["reentrant-qwen3_moe-one", "non-reentrant-gpt_oss-one"]


FURTHER = {"zero0": 2, "zero1": 2, "zero2-offload": 2, "zero3-offload": 2, "fsdp2-noreshard": 2, "fsdp2-offload": 2, "hsdp": 4}


@pytest.mark.parametrize("family, engine", grid(["qwen3_moe", "gpt_oss"], list(FURTHER), often=[]))
def test_every_other_engine_of_the_matrix_equals_it(ranks, expected, family, engine):
    run = of(family, MODES["parts"])
    for result in ranks(FURTHER[engine], train, engine, run):
        assert_same_experts(result, expected(run))


@pytest.mark.parametrize(
    "checkpointing, family, engine",
    grid(["non-reentrant", "reentrant"], ["qwen3_moe", "gpt_oss"], ["one", "zero3", "fsdp2"], often=CHECKPOINTED),
)
def test_gradient_checkpointing_of_both_kinds_equals_it(ranks, expected, checkpointing, family, engine):
    run = variant(of(family, MODES["parts"]), checkpointing=checkpointing)
    for result in run_on(ranks, engine, run):
        assert_same_experts(result, expected(run))


@pytest.mark.parametrize(
    "family, engine", grid(["qwen3_moe", "mixtral", "gpt_oss"], ENGINES, often=["mixtral-one", "qwen3_moe-ddp"])
)
def test_the_models_own_auxiliary_loss_stays_its_own(ranks, expected, family, engine):
    """It is of the tokens that one process sees at once, so the reference computes each rank's part by itself."""
    run = of(family, MODES["accumulated"])
    balanced = variant(run, model={"output_router_logits": True, "router_aux_loss_coef": 0.1})
    wanted = expected(balanced, split=1 if engine == "one" else 2)
    assert min(a - b for a, b in zip(wanted["losses"], expected(run)["losses"], strict=True)) > 0.01
    for result in run_on(ranks, engine, balanced):
        assert_same_experts(result, wanted)


@pytest.mark.parametrize("family, engine", grid(FAMILIES, ENGINES, often=["gpt_oss-one", "deepseek_v3-one", "qwen3_moe-zero2"]))
def test_routers_train_in_full_at_a_rate_of_their_own(ranks, expected, family, engine):
    run = of(family, MODES["accumulated"])
    run = variant(run, config={**run.config, "router_lr_scale": 0.2})
    wanted, start = expected(run), build(run)
    routers = {name for name in wanted["weights"] if ".gate." in name or ".router." in name}
    assert routers
    for name in routers:
        assert 0 < (wanted["weights"][name] - start.get_parameter(name)).abs().max() < 0.2 * 1e-3 * run.steps
    for result in run_on(ranks, engine, run):
        assert_same_experts(result, wanted)


LIMITED = Run(steps=12, max_grad_norm=0.5, calibration=4, config={**DRAWN, "selection": Drawn(outlier_limit=1.3)})


@pytest.mark.parametrize("family, engine", grid(FAMILIES, ENGINES, often=["qwen3_moe-one", "llama4_text-one", "gpt_oss-ddp"]))
def test_input_neurons_that_stand_out_for_an_expert_are_never_drawn_for_it(ranks, expected, family, engine):
    run = of(family, LIMITED)
    wanted, free = expected(run), expected(variant(run, calibration=0, config=DRAWN))
    for key in wanted["experts"]:
        columns = zip(wanted["first"][key][1], free["first"][key][1], strict=True)
        changed = [expert for expert, (with_limit, without) in enumerate(columns) if not torch.equal(with_limit, without)]
        assert changed and IDLE[family] not in changed, key
    for result in run_on(ranks, engine, run):
        assert_same_experts(result, wanted)


WARM = Run(steps=12, calibration=4, config={**PARTS, "selection": Located(start="importance")})


@pytest.mark.parametrize("family, engine", grid(FAMILIES, ENGINES, often=["qwen3_moe-one", "gpt_oss-one", "mixtral-fsdp2"]))
def test_first_subnets_are_located_expert_by_expert(ranks, expected, family, engine):
    run = of(family, WARM)
    wanted, drawn = expected(run), expected(variant(run, calibration=0, config=PARTS))
    for key, (_, first, last) in wanted["experts"].items():
        kept = [torch.equal(wanted["first"][key][0][e - first], drawn["first"][key][0][e - first]) for e in range(first, last)]
        assert not all(kept) or last - first == 1 or IDLE[family] in range(first, last), key
        if IDLE[family] in range(first, last):
            assert kept[IDLE[family] - first], key
    for result in run_on(ranks, engine, run):
        assert_same_experts(result, wanted)


@pytest.mark.parametrize("engine", ["ddp", slow("zero2"), slow("zero3"), slow("fsdp2")])
def test_ranks_localize_parts_of_their_own(ranks, expected, engine):
    run = of("qwen3_moe", MODES["parts"])
    run = variant(run, config={**PARTS, "layers_per_slot": 1, "selection": Located(reduction="by_rank")})
    for result in run_on(ranks, engine, run):
        assert_same_experts(result, expected(run, ranks=2))


BF16 = Run(steps=12, dtype="bf16", max_grad_norm=0.5, config=PARTS)


@pytest.mark.parametrize("family, engine", grid(FAMILIES, ["one", "zero2", "fsdp2"], often=["gpt_oss-one", "qwen3_moe-one"]))
def test_bf16_stays_close_to_fp32(ranks, expected, family, engine):
    """Not a parity bar, as in tests/parity/test_bf16.py: a missing master value or a lost update would show as a drift."""
    run = of(family, BF16)
    wanted = expected(variant(run, dtype="fp32"))["losses"]
    for result in run_on(ranks, engine, run):
        assert max(abs(a - b) for a, b in zip(wanted, result["losses"], strict=True)) < 0.1


@pytest.mark.parametrize("engine", ["zero3", slow("fsdp2")])
def test_experts_alone_train_as_in_one_process(ranks, engine):
    """The first block of experts is the first thing that trains, and a leaf module under ZeRO-3."""
    experts = {"target_modules": ["experts.gate_up_proj", "experts.down_proj"], "output_rank_factor": None}
    run = of("qwen3_moe", variant(MODES["drawn"], config={**DRAWN, **experts}))
    wanted = train("one", run)
    for result in ranks(2, train, engine, run):
        assert_same_run(result, wanted)
