"""DeepSpeed's own two calls save and load LoSiA runs: signatures, results and counters are DeepSpeed's."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from losia_dist import LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, load_checkpoint, losia_parameter_groups
from losia_dist.errors import CheckpointError, UnsupportedError
from tests.support import resume as runs
from tests.support.cases import slow
from tests.support.training import prepared_model

RUN = replace(runs.RUN, steps=12, accumulation=2, batch=4, max_grad_norm=0.5)


def halving(step: int) -> float:
    return 0.5 ** (step // 3)


def begin(stage: int, seed: int = 0, **zero):
    model = prepared_model(RUN)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": RUN.accumulation,
        "gradient_clipping": RUN.max_grad_norm,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    config = LoSiAConfig(**RUN.config, seed=seed)
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=halving)
    return initialize(model=model, losia_config=config, config=settings, lr=1e-3, lr_scheduler=schedule)[0]


def train(engine, stop: int, after_step=None) -> list:
    seen, data = [], runs.global_batches(RUN)
    rank = torch.distributed.get_rank()
    while engine.global_steps < stop:
        for batch in data[engine.global_steps]:
            loss = engine(**{name: t.chunk(2)[rank] for name, t in batch.items()}, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            seen.append((loss.item(), engine.get_lr()[0], engine.micro_steps))
        if after_step is not None:
            after_step()
    return seen


def save_and_load(stage: int, directory: Path, **zero) -> dict:
    engine = begin(stage, **zero)
    assert engine.load_checkpoint(directory) == (None, None)

    def after_step():
        if engine.global_steps == 7:
            assert engine.save_checkpoint(directory, client_state={"epoch": 3})
        if engine.global_steps == 9:
            engine.save_checkpoint(directory, tag="best", save_latest=False)

    undisturbed = train(engine, RUN.steps, after_step)
    expected = {"losses": [], "everything": runs.everything(engine.losia)}
    batch = {name: t.chunk(2)[0] for name, t in runs.global_batches(RUN)[0][0].items()}
    engine.backward(engine(**batch, use_cache=False).loss)
    engine.step()
    with pytest.raises(CheckpointError, match="mid"):
        engine.save_checkpoint(directory)
    engine.losia.detach()
    engine.destroy()

    for tag, step, state in ((None, 7, {"epoch": 3}), ("best", 9, {})):
        engine = begin(stage, seed=1, **zero)
        path, client_state = engine.load_checkpoint(directory, tag=tag)
        assert path == str(directory / (tag or "global_step7")) and client_state == state
        assert (engine.global_steps, engine.global_samples, engine.micro_steps) == (step, step * 8, step * 2)
        assert engine.lr_scheduler.last_epoch == step
        assert train(engine, RUN.steps) == undisturbed[2 * step :]
        runs.assert_equal({"losses": [], "everything": runs.everything(engine.losia), "first": 0}, expected)
        for arguments in ({"load_module_only": True}, {"load_optimizer_states": False}):
            with pytest.raises(UnsupportedError, match="as a whole"):
                engine.load_checkpoint(directory, **arguments)
        with pytest.raises(UnsupportedError, match="written once"):
            engine.save_checkpoint(directory, exclude_frozen_parameters=True)
        for save in (engine.save_16bit_model, engine.save_fp16_model):
            with pytest.raises(UnsupportedError, match=r"losia_dist.export_model\(engine.losia, directory\)"):
                save(directory / "weights")
        assert not (directory / "weights").exists()
        with pytest.raises(CheckpointError, match="no complete checkpoint worst"):
            engine.load_checkpoint(directory, tag="worst")
        engine.losia.detach()
        engine.destroy()
    return expected


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_the_engines_own_calls_resume_exactly(ranks, tmp_path, stage):
    ranks(2, save_and_load, stage, tmp_path)


@pytest.mark.slow
def test_partitions_in_another_order_resume_exactly(ranks, tmp_path):
    ranks(2, save_and_load, 2, tmp_path, round_robin_gradients=True)


def into_another_engine(directory: Path) -> tuple:
    """An engine's checkpoint in a plain loop, with its scheduler; and a plain loop's in an engine."""
    engine = begin(2, round_robin_gradients=True)
    train(engine, 4)
    engine.save_checkpoint(directory / "engine")
    expected = runs.everything(engine.losia)
    model, config = prepared_model(RUN), LoSiAConfig(**RUN.config, seed=1)
    get_losia_model(model, config)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = LoSiAAdamW(losia_parameter_groups(wrapped, lr=1e-3), lr=1e-3)
    losia = runs.LoSiA(wrapped, optimizer, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halving)
    arguments = {"model": wrapped, "optimizer": optimizer, "losia": losia, "scheduler": scheduler}
    load_checkpoint(directory / "engine", **arguments)
    same = all(torch.equal(tensor, expected[name]) for name, tensor in runs.everything(losia).items())
    rates = (scheduler.last_epoch, optimizer.param_groups[0]["lr"])
    runs.save_checkpoint(directory / "plain", **arguments)
    other = begin(3, seed=1)
    other.load_checkpoint(directory / "plain")
    counters = (other.global_steps, other.micro_steps, other.lr_scheduler.last_epoch)
    engine.destroy()
    other.destroy()
    return same, rates, counters


def test_engine_checkpoints_load_in_a_plain_loop_and_back(ranks, tmp_path):
    for same, rates, counters in ranks(2, into_another_engine, tmp_path):
        assert same and rates == (4, 0.5e-3) and counters == (4, 8, 4)
