"""Memory and traffic, counted from live objects: state for subnets only, no full-size buffer, O(m + n) numbers a selection."""

import contextlib
import gc
import io

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups, print_trainable_parameters
from losia_dist.ranks import compat
from losia_dist.run.memory_kinds import held_by_kind
from tests.support.cases import slow
from tests.support.models import tiny_llama
from tests.support.training import Run, train, variant

RUN = Run(steps=3, accumulation=2, max_grad_norm=0.5)
FLOAT = 4


def storage_bytes(tensors) -> int:
    unique = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(unique.values())


def gradients_held(engine) -> list[torch.Tensor]:
    """Every gradient tensor alive between backward and step: the parameters' own and the engine's partitions."""
    zero = engine.optimizer
    held = [t for partition in getattr(zero, "averaged_gradients", {}).values() for t in partition or [] if t is not None]
    held += [p.grad for p in engine.module.parameters() if p.grad is not None]
    buffer = getattr(zero, "grad_partitions_flat_buffer", None)  # stage 3: the partitions are views of it
    if buffer is None:
        return held
    return [buffer] + [t for t in held if t.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()]


def live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_floating_point() and o.numel()]


def count(engine_name: str, dtype: str) -> dict[str, int]:
    """Bytes on this rank, seen at the second step; and every tensor whose shape is a target weight's."""
    seen: dict[str, int] = {}
    others = live_tensors()  # what earlier tests left on this rank; held, so that no number is given twice
    older = {id(tensor) for tensor in others}

    def inspect(stage, losia, engine):
        if losia.steps < 1:
            return
        if stage == "before":
            held = gradients_held(engine)
            seen["gradients"] = sum(t.numel() * t.element_size() for t in held)
            seen["gradient_storage"] = storage_bytes(held)
            return
        seen["state"] = storage_bytes(losia.state.state_tensors())
        seen["subnet_elements"] = sum(layer.row_index.numel() * layer.col_index.numel() for layer in losia.sites)
        seen["groups"] = len(losia.clock.names)
        sizes = [(layer.group_name, layer.row_index.numel() * layer.col_index.numel()) for layer in losia.sites]
        seen["largest_subnets"] = sum(max(s for g, s in sizes if g == name) for name in losia.clock.names)
        seen["parameters"] = len(losia.sites)
        shapes = {losia.parameters.shape(layer.weight) for layer in losia.sites}
        weights = {p.data_ptr() for p in engine.module.parameters()}
        full = [t for t in live_tensors() if tuple(t.shape) in shapes and id(t) not in older and t.data_ptr() not in weights]
        seen["full_size"] = len(full)

    train(engine_name, variant(RUN, dtype=dtype), inspect)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_of_all_ranks_together_is_that_of_the_subnets_plus_padding(ranks, stage, dtype):
    seen = ranks(2, count, f"zero{stage}", dtype)
    elements = seen[0]["subnet_elements"]
    # Padding: stages 1 and 2 align each group to 4 elements a rank; stage 3 pads each parameter to the ranks.
    padding = 8 * (seen[0]["groups"] if stage < 3 else seen[0]["parameters"])
    state = sum(rank["state"] for rank in seen)
    assert 3 * FLOAT * elements <= state <= 3 * FLOAT * (elements + padding)  # master and two moments
    # Stage 1 keeps the gradients of all subnets on both ranks until the step. From stage 2 on each rank keeps its part;
    # at stage 2 the subnet on the border of two parts is kept as a view of its whole gradient on either side.
    element_size = 2 if dtype == "bf16" else FLOAT
    whole = element_size * (elements + padding) * (2 if stage == 1 else 1)
    assert element_size * elements <= sum(rank["gradients"] for rank in seen) <= whole
    border = element_size * seen[0]["largest_subnets"] * 2 if stage == 2 else 0
    assert sum(rank["gradient_storage"] for rank in seen) <= whole + border


@pytest.mark.parametrize("stage", [slow(1), 2, 3])
def test_no_buffer_of_a_whole_weights_size_stays_alive(ranks, stage):
    assert [rank["full_size"] for rank in ranks(2, count, f"zero{stage}", "fp32")] == [0, 0]


def count_kinds(engine_name: str) -> dict[str, dict[str, int]]:
    """What this rank holds after a step, by kind, and the elements of which that should be."""
    seen: dict[str, dict[str, int]] = {}

    def inspect(stage, losia, engine):
        if stage == "before":
            return
        seen["held"] = held_by_kind(losia.model, losia.state.optimizer, losia.accumulators.values(), torch.device("cpu"))
        sizes = {layer: losia.parameters.shape(layer.weight) for layer in losia.sites}
        seen["elements"] = {
            "trained": sum(layer.row_index.numel() * layer.col_index.numel() for layer in losia.sites),
            "indices": sum(layer.row_index.numel() + layer.col_index.numel() for layer in losia.sites),
            "frozen": sum(m * n for m, n in sizes.values()),
            "localizing": sum(m * n for layer, (m, n) in sizes.items() if layer.group_name in losia.localizing),
            "layers": len(losia.sites),
        }

    train(engine_name, RUN, inspect)
    return seen


@pytest.mark.parametrize("engine", [slow("ddp"), slow("zero1"), slow("zero2"), "zero3", "fsdp2"])
def test_memory_by_kind_of_all_ranks_together_is_that_of_the_tensors(ranks, engine):
    seen = ranks(2, count_kinds, engine)
    held = {kind: sum(rank["held"][kind] for rank in seen) for kind in seen[0]["held"]}
    elements = seen[0]["elements"]
    padding = 0 if engine in ("ddp", "fsdp2") else 8 * elements["layers"]
    whole = 1 if engine in ("zero3", "fsdp2") else 2  # copies of a parameter, one on each rank
    each = 3 if engine.startswith("zero") else 2 * (2 if engine == "ddp" else 1)  # masters and moments; or moments alone
    step_counts = 2 * FLOAT * elements["layers"]
    assert each * FLOAT * elements["trained"] <= held["optimizer"]
    assert held["optimizer"] <= each * FLOAT * (elements["trained"] + padding) + step_counts
    indices = 2 * 8 * elements["indices"]
    assert whole * FLOAT * elements["trained"] + indices <= held["trained"]
    assert held["trained"] <= whole * FLOAT * (elements["trained"] + padding) + indices
    # Two averages, of which either rank has its rows.
    assert 2 * FLOAT * elements["localizing"] <= held["importance"] <= 2 * FLOAT * (elements["localizing"] + 7 * 64)
    assert whole * FLOAT * elements["frozen"] <= held["weights"] and held["host"] == 0


class FullSizeResults(TorchDispatchMode):
    """Counts operations whose result is a new tensor of a target weight's shape."""

    def __init__(self, shapes, weights) -> None:
        super().__init__()
        self.shapes, self.weights, self.found = shapes, weights, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor) and {tuple(t.shape), tuple(t.shape)[::-1]} & self.shapes:
                storage = t.untyped_storage().data_ptr()
                if storage not in self.weights:
                    self.found.append((str(function), storage))
        return result


@pytest.mark.parametrize("targets, localizing", [("all-linear", 7), (["mlp.up_proj"], 1)])
def test_a_step_makes_one_full_gradient_per_localizing_layer_and_nothing_else_that_large(targets, localizing):
    model, config = (
        tiny_llama(hidden_size=36, num_key_value_heads=3),
        LoSiAConfig(rank_factor=0.25, period=9, target_modules=targets),
    )
    get_losia_model(model, config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    losia = LoSiA(model, optimizer, config)
    shapes = {tuple(layer.weight.shape) for layer in losia.sites}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    averages = {t.untyped_storage().data_ptr() for a in losia._accumulators.values() for t in (a.mean, a.deviation)}
    tokens = torch.randint(0, 97, (1, 13))  # 13 tokens: no activation has a weight's shape
    with FullSizeResults(shapes, weights | averages) as mode:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losia.step()
    assert len({storage for _, storage in mode.found}) <= localizing
    assert sum("mm" in name for name, _ in mode.found) == localizing


def count_selection(engine_name: str) -> dict[str, int]:
    """Elements that one re-localization sends, by kind, on this rank."""
    sent: dict[str, int] = {}
    originals = {}

    def counted(module, name, size_of):
        original = getattr(module, name)
        originals[module, name] = original

        def call(*args, **kwargs):
            sent[name] = sent.get(name, 0) + size_of(*args)
            sent["largest"] = max(sent.get("largest", 0), size_of(*args))
            return original(*args, **kwargs)

        setattr(module, name, call)

    def begin(group):
        counted(dist, "all_reduce", lambda t, *_: t.numel())
        counted(compat, "all_gather_flat", lambda out, *_: out.numel())
        counted(compat, "reduce_scatter_flat", lambda out, whole, *_: whole.numel())

    def end(move):  # once the whole group has moved
        for (module, name), original in originals.items():
            setattr(module, name, original)

    def inspect(stage, losia, engine):
        if losia.steps != 0 or stage != "before":
            return
        losia.on_relocalize.append(begin)
        losia.on_move.append(end)
        layers = [layer for layer in losia.sites if layer.group_name in losia.localizing]
        shapes = [losia.parameters.shape(layer.weight) for layer in layers]
        sent["m_plus_n"] = sum(m + n for m, n in shapes)
        sent["smallest_weight"] = min(m * n for m, n in shapes)
        sent["subnets"] = sum(
            layer.subnet.ds_numel if hasattr(layer.subnet, "ds_numel") else layer.subnet.numel() for layer in layers
        )
        sent["layers"] = len(layers)

    config = {"rank_factor": 0.125, "period": 1}
    train(
        engine_name,
        Run(steps=1, config=config, model={"hidden_size": 96, "intermediate_size": 176, "num_key_value_heads": 3}),
        inspect,
    )
    return sent


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_one_selection_sends_row_and_column_sums_and_never_a_matrix(ranks, engine):
    for sent in ranks(2, count_selection, engine):
        padding, fingerprints = 2 * 2 * sent["layers"], 2 * sent["layers"]
        moved = 2 * sent["subnets"] + 2 * sent["layers"] if engine == "zero3" else 0  # old values out, new values in
        total = sent["all_reduce"] + sent["all_gather_flat"]
        assert total <= 2 * sent["m_plus_n"] + padding + fingerprints + moved
        assert "reduce_scatter_flat" not in sent
        assert sent["largest"] < sent["smallest_weight"] / 8


def counted_parameters(engine_name: str) -> str:
    """What `print_trainable_parameters` prints of the engine's model."""
    shown = io.StringIO()

    def inspect(stage, losia, engine):
        if stage == "before":
            assert losia.layers is losia.sites  # the older name
            with contextlib.redirect_stdout(shown):
                print_trainable_parameters(losia.model)

    train(engine_name, Run(steps=1), inspect)
    return shown.getvalue()


def test_whole_parameters_are_counted_on_every_engine(ranks):
    told = {text for engine in ("ddp", "zero3", "fsdp2") for text in ranks(2, counted_parameters, engine)}
    assert told == {counted_parameters("one")} and "trainable params: " in told.pop()
