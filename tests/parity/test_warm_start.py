"""First subnets located by importance, against the dense reference: the same on every engine, and so is the training after."""

import pytest
import torch

from losia_dist import Located, LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.models import tiny_llama
from tests.support.training import Run, calibration_batches, reference, train, variant

CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "selection": Located(start="importance")}
BASE = Run(steps=6, calibration=4, accumulation=2, max_grad_norm=0.5, config=CONFIG)
TIED = variant(BASE, model={"tie_word_embeddings": True})
HSDP = pytest.param("hsdp", marks=pytest.mark.slow)  # four ranks on two cores
ENGINES = ["ddp", "zero2", "zero3", "fsdp2", HSDP]


_references: dict[str, dict] = {}


def expected_of(run: Run):
    """The dense reference's run; trained once."""
    if repr(run) not in _references:
        _references[repr(run)] = reference(run)
    return _references[repr(run)]


def assert_same_start(result, expected):
    assert result["first"].keys() == expected["first"].keys()
    for name, places in expected["first"].items():
        for found, wanted in zip(result["first"][name], places, strict=True):
            assert found.tolist() == wanted.tolist(), name


def run_everywhere(ranks, engine, run):
    results = [train(engine, run)] if engine == "one" else ranks(4 if engine == "hsdp" else 2, train, engine, run)
    expected = expected_of(run)
    for result in results:
        assert_same_start(result, expected)
        assert_same_run(result, expected)


@pytest.mark.parametrize("engine", ["one", *ENGINES])
def test_every_engine_locates_what_the_reference_does_and_trains_on(ranks, engine):
    random = expected_of(variant(BASE, config={**CONFIG, "selection": Located()}, calibration=0))
    expected = expected_of(BASE)
    assert any(expected["first"][n][0].tolist() != random["first"][n][0].tolist() for n in expected["first"])
    run_everywhere(ranks, engine, BASE)


@pytest.mark.parametrize("engine", ["one", slow("zero3"), "fsdp2"])
def test_a_shared_output_layer_is_located_by_both_parts_of_its_gradient(ranks, engine):
    run_everywhere(ranks, engine, TIED)


@pytest.mark.parametrize("engine", ["one", slow("zero3"), slow("fsdp2")])
def test_activations_may_be_recomputed(ranks, engine):
    run_everywhere(ranks, engine, variant(BASE, checkpointing="non-reentrant"))


def located(config: LoSiAConfig, count: int = 3, **model):
    torch.manual_seed(0)
    wrapped = get_losia_model(tiny_llama(**model), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(wrapped, lr=1e-3), lr=1e-3)
    losia = LoSiA(wrapped, optimizer, config)
    moves = []
    losia.on_move.append(moves.append)
    passes = losia.locate(calibration_batches(Run(calibration=count)))
    return wrapped, optimizer, losia, moves, passes


def test_nothing_but_the_place_of_the_subnets_changes_and_no_gradient_is_left():
    before = {name: value.clone() for name, value in tiny_llama().state_dict().items()}
    model, _, losia, moves, passes = located(
        LoSiAConfig(rank_factor=0.25, selection=Located(start="importance")), attention_dropout=0.1
    )
    assert passes == 2 and losia.steps == 0
    assert all(p.grad is None for p in model.parameters())
    losia.consolidate()
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert len(moves) == len(losia.sites)
    for move in moves:
        assert move.reason == "located" and move.captured > 1.3 * move.random_share


def test_calibration_uses_up_no_random_numbers():
    config = LoSiAConfig(rank_factor=0.25, selection=Located(start="importance"))
    model = get_losia_model(tiny_llama(attention_dropout=0.1), config)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    before = torch.get_rng_state()
    losia.locate(calibration_batches(Run(calibration=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_reentrant_checkpointing_is_refused():
    config = LoSiAConfig(rank_factor=0.25, selection=Located(start="importance"))
    model = get_losia_model(tiny_llama(), config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    with pytest.raises(ConfigError, match="reentrant.*'use_reentrant': False"):
        losia.locate(calibration_batches(Run(calibration=1)))


def test_a_compiled_model_is_located_as_it_is_without():
    config = LoSiAConfig(rank_factor=0.25, selection=Located(start="importance"))
    *_, plain, _ = located(config)
    torch.manual_seed(0)
    model = get_losia_model(tiny_llama(), config)
    compiled = torch.compile(model, backend="eager")
    losia = LoSiA(compiled, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    batches = calibration_batches(Run(calibration=3))
    compiled(**batches[0]).loss.backward()  # compiled before it is located
    compiled.zero_grad()
    losia.discard_step()
    moves = []
    losia.on_move.append(moves.append)
    losia.locate(batches)
    for move, other in zip(moves, plain, strict=True):
        assert torch.equal(move.rows, other.rows) and torch.equal(move.columns, other.columns)


def test_all_rows_kept_takes_one_pass():
    *_, passes = located(LoSiAConfig(rank_factor=(1.0, 0.25), selection=Located(start="importance")))
    assert passes == 1


def test_a_step_before_locating_is_refused_and_changes_nothing():
    config = LoSiAConfig(rank_factor=0.25, selection=Located(start="importance"))
    model = get_losia_model(tiny_llama(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    LoSiA(model, optimizer, config)
    before = [p.clone() for p in model.parameters()]
    model(**calibration_batches(Run(calibration=1))[0]).loss.backward()
    with pytest.raises(ConfigError, match=r"start='importance'.*losia.locate\(batches\).*start='random'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_locating_after_the_first_step_is_refused():
    model, optimizer, losia, *_ = located(LoSiAConfig(rank_factor=0.25, selection=Located(start="importance")))
    batch = calibration_batches(Run(calibration=1))
    model(**batch[0]).loss.backward()
    optimizer.step()
    losia.step()
    with pytest.raises(ConfigError, match="before training begins; 1 steps"):
        losia.locate(batch)


def test_no_batches_and_batches_without_labels_are_refused():
    config = LoSiAConfig(rank_factor=0.25, selection=Located(start="importance"))
    model = get_losia_model(tiny_llama(), config)
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), config)
    with pytest.raises(ConfigError, match="at least one"):
        losia.locate([])


def unequal(config):
    import torch.distributed as dist

    model = get_losia_model(tiny_llama(), LoSiAConfig(**config))
    losia = LoSiA(model, LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3), LoSiAConfig(**config))
    try:
        losia.locate(calibration_batches(Run(calibration=1 + dist.get_rank())))
    except ConfigError as error:
        return str(error)
    finally:
        losia.detach()


def test_unequal_counts_are_refused_on_every_rank(ranks):
    for message in ranks(2, unequal, {"rank_factor": 0.25, "selection": Located(start="importance")}):
        assert "[1, 2]" in message and "equally many" in message


def test_auto_layers_per_slot_locates_every_layer_in_the_run():
    config = LoSiAConfig(rank_factor=0.25, period=2, layers_per_slot="auto")
    model = get_losia_model(tiny_llama(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    with pytest.raises(ConfigError, match="pass total_steps"):
        LoSiA(model, optimizer, config)
    with pytest.raises(ConfigError, match="2 steps are too few.*at least 3"):
        LoSiA(model, optimizer, config, total_steps=2)
    losia = LoSiA(model, optimizer, config, total_steps=5)  # two slots end before the run does
    assert losia.config.layers_per_slot == 2 and len(losia.localizing) == 2


def test_rank_pattern_sets_layers_apart_and_names_that_match_nothing_are_refused():
    pattern = {"mlp.down_proj": [1, 0.125], "down_proj": 0.5, "layers.1.self_attn.q_proj": 0.5}
    model = get_losia_model(tiny_llama(), LoSiAConfig(rank_factor=0.25, rank_pattern=pattern))
    layers = model.model.layers
    assert tuple(layers[0].mlp.down_proj.subnet.shape) == (36, 9)
    assert tuple(layers[1].self_attn.q_proj.subnet.shape) == (18, 18)
    assert tuple(layers[0].self_attn.q_proj.subnet.shape) == (9, 9)
    with pytest.raises(ConfigError, match="rank_pattern.*'dwn_proj'"):
        get_losia_model(tiny_llama(), LoSiAConfig(rank_pattern={"dwn_proj": 0.5}))
