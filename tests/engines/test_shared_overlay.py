"""What subnets leave beside a quantized base: ranks that share the base keep parts of it, others all of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from losia_dist import Located, LoSiAConfig, get_losia_model, load_checkpoint, save_checkpoint
from losia_dist.checkpoint.tensor_names import unwrap
from losia_dist.sharding.rank_shares import RankShares
from losia_dist.subnet.experts_overlay import ExpertsOverlay
from losia_dist.subnet.overlay import Overlay
from losia_dist.subnet.packed import packed_weights
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.training import Run, reference, train, variant

CONFIG = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2, "selection": "random", "retired": "nf4"}
SIZES = {"hidden_size": 96, "intermediate_size": 160}
PLAIN = Run(steps=14, model=SIZES, config=CONFIG, quantized="nf4:double")
MIXTURE = Run(steps=14, config=CONFIG, family="mixture:qwen3_moe", quantized="nf4:double:experts")


def kept_after(engine: str, run: Run) -> tuple[int, int]:
    """Bytes of all overlays after a run: on this rank, and in all."""
    found = []

    def look(stage, losia, _):
        overlays = [one.packed.overlay for one in packed_weights(losia.model).values()]
        found.append((sum(one.nbytes for one in overlays), sum(one.whole_bytes for one in overlays)))

    train(engine, run, look)
    return found[-1]


@pytest.mark.parametrize(
    "engine, world, ranks_of_a_copy, run",
    [("fsdp2", 2, 2, PLAIN), slow("zero3", 2, 2, PLAIN), slow("fsdp2", 2, 2, MIXTURE), ("ddp", 2, 1, PLAIN)]
    + [slow("hsdp", 4, 2, PLAIN), slow("fsdp2", 4, 4, PLAIN), slow("zero3", 2, 2, MIXTURE), slow("hsdp", 4, 2, MIXTURE)],
)
def test_each_rank_keeps_its_part_alone(ranks, engine, world, ranks_of_a_copy, run):
    run = variant(run, steps=6)
    whole = ranks(1, kept_after, "one", run)[0][1]
    for mine, in_all in ranks(world, kept_after, engine, run):
        assert in_all == whole > 0
        assert mine == pytest.approx(whole / ranks_of_a_copy, rel=0.05)


def alone_and_together(run: Run) -> None:
    """The first rank passes more often than the other, over weights that FSDP2 has gathered."""
    losia, stepper, close = runs.start("fsdp2", run)
    runs.train_on(losia, stepper, run, 9)
    model, tokens = losia.model.eval(), torch.arange(3, 15).reshape(1, 12)

    @torch.no_grad()
    def loss() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    overlays = [one.packed.overlay for one in packed_weights(model).values()]
    together, part = loss(), sum(one.nbytes for one in overlays)
    for unit in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    with losia.parameters.whole_overlays():
        assert sum(one.nbytes for one in overlays) == sum(one.whole_bytes for one in overlays) > part
        for _ in range(3 if dist.get_rank() == 0 else 1):
            assert torch.equal(loss(), together)
    assert sum(one.nbytes for one in overlays) == part and torch.equal(loss(), together)
    with pytest.raises(KeyError), losia.parameters.whole_overlays():
        raise KeyError
    assert sum(one.nbytes for one in overlays) == part
    close()


def test_ranks_may_pass_alone_while_each_keeps_all_of_it(ranks):
    ranks(2, alone_and_together, PLAIN)


BY_RANK = {"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 3, "retired": "fp32"}


@pytest.mark.parametrize("engine", ["fsdp2", slow("zero3")])
def test_ranks_that_localize_by_themselves_still_read_it_together(ranks, engine):
    """The first layer's input needs no gradient, so that only the rank with a full gradient to score would read the weight."""
    run = Run(
        steps=26,
        model={"hidden_size": 48, "intermediate_size": 80},
        config={**BY_RANK, "selection": Located(reduction="by_rank")},
        quantized="nf4:double",
    )
    for result in ranks(2, train, engine, run):
        assert_same_run(result, reference(variant(run, checkpointing="off"), ranks=2))


def cut_and_gathered(kind: str, form: str) -> None:
    """The same differences in an overlay that ranks share, and in one that they do not: equal to the bit, folded or not."""
    torch.manual_seed(3)
    shape = (24, 40) if kind == "linear" else (4, 12, 40)
    make = Overlay if kind == "linear" else ExpertsOverlay
    whole, shared = make(shape, form), make(shape, form)
    shared.share(RankShares.of(dist.group.WORLD))
    values, sizes = torch.randn(shape), []
    for place in range(20):
        rows, columns = (torch.randperm(size)[: 5 + place % 3].sort().values for size in shape[-2:])
        index, difference = (rows, columns), torch.randn(len(rows), len(columns))
        if kind == "experts":
            experts = torch.arange(4)[place % 2 :]
            index = (experts, *(one.expand(len(experts), -1).contiguous() for one in index))
            difference = torch.randn(len(experts), len(rows), len(columns))
        for overlay in (whole, shared):
            overlay.add(*index, difference)
        sizes.append(len(whole))
        assert len(shared) == len(whole) and shared.whole_bytes == whole.whole_bytes
        assert torch.equal(shared.add_to(values.clone()), whole.add_to(values.clone()))
        block = values[index[0][:, None], index[1]] if kind == "linear" else torch.zeros_like(difference)
        assert torch.equal(shared.add_to_block(block.clone(), *index), whole.add_to_block(block.clone(), *index))
    assert max(sizes) > min(sizes[sizes.index(max(sizes)) :])  # differences became one of the whole on the way
    again = make(shape, form)
    again.write(shared.read())
    assert torch.equal(again.add_to(values.clone()), whole.add_to(values.clone()))
    shared.share(None)
    assert not shared.is_shared and shared.nbytes == whole.nbytes


@pytest.mark.parametrize("form", ["nf4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_what_is_gathered_is_what_was_kept(ranks, kind, form):
    ranks(3, cut_and_gathered, kind, form)


def a_listed_expert() -> None:
    import torch.distributed.device_mesh as meshes
    from torch.distributed.fsdp import fully_shard

    from losia_dist.sharding.resolve import resolve_parameters
    from tests.support.quantized import quantize

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(64, 64)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))

    model = torch.nn.Sequential()
    model.layers = torch.nn.ModuleList([Block()])
    top = torch.nn.Module()
    top.model = model
    quantize(top, "nf4")
    get_losia_model(top, LoSiAConfig(rank_factor=0.25, selection="random", target_modules=["up", "0", "1"]))
    fully_shard(top, mesh=meshes.init_device_mesh("cpu", (2,)))
    access = resolve_parameters(top)
    shared = {name: one.packed.overlay._shares is not None for name, one in access.layers.items()}
    assert shared == {
        "model.layers.0.up": True,
        "model.layers.0.experts.0": False,
        "model.layers.0.experts.1": False,
    }


def test_experts_that_are_modules_of_their_own_keep_it_whole(ranks):
    """A rank computes those of its tokens alone, and could not gather with the others."""
    ranks(2, a_listed_expert)


def overlays_of(losia) -> dict[str, torch.Tensor]:
    """All that subnets left, whole, in order."""
    layers = packed_weights(unwrap(losia.model))
    return {
        f"{name}/{number}/{part}": tensor.clone()
        for name, one in layers.items()
        for number, left in enumerate(one.packed.overlay.read())
        for part, tensor in left._asdict().items()
        if tensor is not None
    }


def saved_by(engine: str, run: Run, directory):
    losia, stepper, close = runs.start(engine, run)
    runs.train_on(losia, stepper, run, 9)
    save_checkpoint(directory, **runs.parts(losia))
    found = overlays_of(losia)
    close()
    return found


def loaded_by(engine: str, run: Run, directory):
    losia, _, close = runs.start(engine, run)
    load_checkpoint(directory, **runs.parts(losia))
    found = overlays_of(losia)
    kept = [one.packed.overlay for one in packed_weights(unwrap(losia.model)).values()]
    close()
    return found, sum(one.nbytes for one in kept), sum(one.whole_bytes for one in kept)


@pytest.mark.parametrize("run", [PLAIN, slow(MIXTURE)])
def test_it_is_saved_once_and_cut_anew_for_other_ranks(ranks, tmp_path, run):
    """From two ranks to one, to four in two copies, and to two of another engine; to the bit."""
    wanted = ranks(2, saved_by, "fsdp2", run, tmp_path)[0]
    files = [load_file(path) for path in tmp_path.rglob("*.safetensors")]
    stored = [name for tensors in files for name in tensors if name.startswith("overlay/")]
    assert sorted(stored) == sorted(f"overlay/{name}" for name in wanted) and stored
    for engine, world, parts in (("one", 1, 1), ("hsdp", 4, 2), ("zero3", 2, 2)):
        for found, mine, in_all in ranks(world, loaded_by, engine, run, tmp_path):
            assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert mine == pytest.approx(in_all / parts, rel=0.05)
