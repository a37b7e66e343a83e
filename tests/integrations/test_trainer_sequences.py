"""LoSiATrainer and a loop over Accelerate with `ParallelismConfig(sp_size=2)`: one process's losses, weights and places."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig, ParallelismConfig

from losia_dist import (
    Located,
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    LoSiATrainer,
    get_losia_model,
    losia_parameter_groups,
    sequence_loss,
    split_sequence,
)
from tests.support import training
from tests.support.cases import slow
from tests.support.compare import assert_same_run
from tests.support.sequences import Run, build, reference, train_batches
from tests.support.trainers import Recorder, arguments, close, fresh_accelerate, linear_rate, result_of
from tests.support.training import RATE
from tests.support.training import Run as Plain

RUN = Run(steps=10, accumulation=2, max_grad_norm=0.2, length=11)  # a length that two ranks do not divide
SHARED = {"sp_size": 2, "sp_backend": "deepspeed"}


@contextlib.contextmanager
def attention_as_before():
    """Accelerate registers Ulysses for every model of the process; other tests on this rank shall not meet it."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from losia_dist.integrations.deepspeed.ulysses import forget_sequences

    kept = ALL_ATTENTION_FUNCTIONS["sdpa"]
    parallel_state_sp._release_sequence_parallel_groups()
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = kept
        parallel_state_sp._release_sequence_parallel_groups()
        forget_sequences()


def examples(run: Run) -> list[dict[str, torch.Tensor]]:
    batches = [batch for step in train_batches(run) for batch in step]
    return [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(run.batch)]


def train_with_trainer(directory: str, stage: int, run: Run, model=None, **changes):
    plain = Plain(batch=2 * run.batch, steps=run.steps, accumulation=run.accumulation, max_grad_norm=run.max_grad_norm)
    with fresh_accelerate(), attention_as_before():
        recorder = Recorder()
        changes = {"parallelism_config": ParallelismConfig(**SHARED), **changes}
        recorder.trainer = trainer = LoSiATrainer(
            model=build(run) if model is None else model,
            args=arguments(directory, plain, f"zero{stage}", **changes),
            train_dataset=examples(run),
            eval_dataset=examples(run)[:8],
            losia_config=LoSiAConfig(**run.config),
            callbacks=[recorder],
        )
        trainer.train()
        result = {**result_of(trainer), "history": recorder.history, "evaluated": trainer.evaluate()["eval_loss"]}
        close(trainer)
        return result


@pytest.fixture
def expected(monkeypatch):
    monkeypatch.setattr(training, "rate_at", linear_rate)
    return reference


@pytest.mark.parametrize("stage", [slow(0), slow(1), slow(2), 3])
def test_the_trainer_equals_one_process(ranks, tmp_path, expected, stage):
    for result in ranks(2, train_with_trainer, str(tmp_path), stage, RUN):
        assert_same_run(result, expected(RUN))
        assert result["evaluated"] > 0


@pytest.mark.parametrize("stage", [slow(2)])
def test_its_first_subnets_are_located_from_whole_sequences(ranks, tmp_path, expected, stage):
    located = Located(start="importance", calibration_batches=2)
    run = Run(steps=5, length=12, config={**Run().config, "selection": located})
    for result in ranks(2, train_with_trainer, str(tmp_path), stage, run):
        assert len(result["losses"]) == 5


UNFIT = {
    "eager": ({"attn_implementation": "eager"}, {}, "UnsupportedError", "attn_implementation='eager'"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 3}, {}, "ConfigError", "3 of queries"),
    "outliers": ({}, {"rank_factor": 0.25, "selection": "drawn"}, "UnsupportedError", "outlier_limit=6.0 with sp_size=2"),
}


def start(directory: str, kind: str) -> None:
    from losia_dist import Drawn

    model, config, _, _ = UNFIT[kind]
    config = {**config, "selection": Drawn(outlier_limit=6.0)} if config else Run().config
    train_with_trainer(directory, 3, Run(steps=2, model=model, config=config))


@pytest.mark.parametrize("kind", ["eager", slow("heads"), slow("outliers")])
def test_what_cannot_be_shared_is_refused_before_the_engine_is_made(ranks, tmp_path, kind):
    for error, message in ranks.errors(2, start, str(tmp_path), kind):
        assert error == UNFIT[kind][2] and UNFIT[kind][3] in message


def loop_over_accelerate(stage: int, run: Run):
    """Losses of a loop of somebody's own. (Without a GPU Accelerate takes each rank for alone, and would deal out data so.)"""
    with fresh_accelerate(), attention_as_before():
        zero = {"stage": stage, "reduce_bucket_size": 100_000}
        settings = {
            "train_micro_batch_size_per_gpu": run.batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": run.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
            parallelism_config=ParallelismConfig(
                **SHARED, sp_handler=DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
            ),
        )
        config = LoSiAConfig(**run.config)
        model = get_losia_model(build(run).train(), config)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=RATE), lr=RATE)
        model, optimizer = accelerator.prepare(model, optimizer)
        losia = LoSiA(model, optimizer.optimizer, config)
        losses = []
        for step, (batch,) in enumerate(train_batches(run)):
            for group in optimizer.param_groups:
                group["lr"] = linear_rate(step, run.steps)
            part = split_sequence(batch, rank=dist.get_rank(), size=2)
            mean = model(**part, use_cache=False).loss
            loss = sequence_loss(mean, part["shift_labels"], losia.sequence.group)
            accelerator.backward(loss)
            losia.step()
            losses.append(loss.item())
        losia.detach()
        model.destroy()
        return losses


@pytest.mark.parametrize("stage", [2, slow(3)])
def test_a_loop_over_accelerate_equals_one_process(ranks, expected, stage):
    run = Run(steps=10, max_grad_norm=0.2)
    for losses in ranks(2, loop_over_accelerate, stage, run):
        assert losses == pytest.approx(expected(run)["losses"], abs=1e-5)
