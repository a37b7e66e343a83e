"""What else a Trainer is asked to do in its life: evaluate first, train again, stop at a signal. The run stays the run."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from losia_dist import LoSiA, LoSiAAdamW, LoSiACallback, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import DivergenceError, UnsupportedError
from losia_dist.ranks.compat import DDP_KEEPS_BUFFERS
from tests.support.cases import only, slow
from tests.support.compare import assert_same_run
from tests.support.models import tiny_llama
from tests.support.trainers import Recorder, arguments, close, examples, fresh_accelerate, result_of, trainer_of
from tests.support.training import Run

RUN = Run(steps=6, config={"rank_factor": 0.25, "period": 3})


def life(directory, engine, before=(), run=RUN, **changes):
    """Do what `before` names, then train; what the training gave."""
    with fresh_accelerate():
        recorder = Recorder()
        trainer = recorder.trainer = trainer_of(str(directory), engine, run, callbacks=[recorder], **changes)
        for what in before:
            if what == "predict":
                trainer.predict(trainer.eval_dataset)
            else:
                getattr(trainer, what)()
            recorder.history.clear()
        trainer.train()
        result = result_of(trainer) | {"history": recorder.history}
        close(trainer)
        return result


def lives(ranks, engine, *args, **settings):
    if engine == "one":
        return [life(args[0], engine, *args[1:], **settings)]
    return ranks(2, life, args[0], engine, *args[1:], **settings)


@pytest.mark.parametrize(
    "engine, before, changes",
    [
        pytest.param("ddp", ["evaluate"], {}, id="ddp"),
        slow("ddp", ["predict"], {"bf16": True}, id="ddp-bf16"),
        slow("zero3", ["predict", "evaluate"], {}, id="zero3"),
    ],
)
def test_an_evaluation_before_training_leaves_the_run_what_it_is(ranks, tmp_path, engine, before, changes):
    wanted = lives(ranks, engine, tmp_path, **changes)
    found = lives(ranks, engine, tmp_path, before, **changes)
    for result, expected in zip(found, wanted, strict=True):
        assert result["engine"] == expected["engine"] and result["engine"]["wrapper"] != "LlamaForCausalLM"
        assert_same_run(result, expected, tolerance=0.0)


@pytest.mark.parametrize("engine, words", [("fsdp2", "under FSDP2"), ("zero2", "DeepSpeed below ZeRO-3")])
def test_where_the_engine_cannot_evaluate_yet_it_says_so(ranks, tmp_path, engine, words):
    for kind, message in ranks.errors(2, life, tmp_path, engine, ["evaluate"]):
        assert kind == "UnsupportedError" and words in message and "eval_on_start=True" in message


@pytest.mark.parametrize("engine", ["ddp", slow("zero2"), slow("fsdp2")])
def test_training_again_goes_on_on_several_ranks(ranks, tmp_path, engine):
    once = lives(ranks, engine, tmp_path)
    twice = lives(ranks, engine, tmp_path, ["train", "evaluate"])
    assert twice[0]["engine"] == once[0]["engine"]
    assert twice[0]["losses"] == twice[1]["losses"] and sum(twice[0]["losses"]) < sum(once[0]["losses"])
    for name, weight in twice[0]["weights"].items():
        assert torch.equal(weight, twice[1]["weights"][name]), name


def plain_trainer(directory, evaluates):
    """LoSiACallback in a Trainer of Transformers' own."""
    with fresh_accelerate():
        config = LoSiAConfig(rank_factor=0.25, period=100)
        model = get_losia_model(tiny_llama(), config)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
        callback = LoSiACallback(config)
        args = arguments(str(directory), RUN, "ddp")
        data = {"train_dataset": examples(RUN), "eval_dataset": examples(RUN)[:8]}
        trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[callback], **data)
        if evaluates:
            trainer.evaluate()
        try:
            trainer.train()
        finally:
            callback.losia.detach()
        return trainer.state.global_step


def test_a_plain_trainer_that_never_wraps_ends_after_the_first_steps(ranks, tmp_path):
    """The first step is made at a learning rate of 0, and changes nothing anywhere."""
    assert ranks(2, plain_trainer, tmp_path, False) == [RUN.steps] * 2
    for kind, message in ranks.errors(2, plain_trainer, tmp_path, True):
        assert kind == "DivergenceError" and "not wrapped" in message and "evaluate() or predict() before train()" in message


def plain_loop(way, steps=3):
    """Each rank has data of its own; `way`: who reduces the gradients."""
    import torch.distributed as dist

    config = LoSiAConfig(rank_factor=0.25, period=100)
    model: nn.Module = get_losia_model(tiny_llama(), config)
    if way == "ddp":
        model = DistributedDataParallel(model, **DDP_KEEPS_BUFFERS)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True) if way == "each for itself" else None
    losia = LoSiA(model, optimizer, config, process_group=group)
    for step in range(steps):
        tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        (model(input_ids=tokens, labels=tokens).loss * (way != "zeros first" or step > 0)).backward()
        if way == "by hand":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        try:
            optimizer.step()
            losia.step()
        except DivergenceError as error:
            return step, str(error)
        optimizer.zero_grad()
    return steps, ""


@pytest.mark.parametrize("way, ends", [("ddp", 3), ("by hand", 3), ("each for itself", 3), ("nobody", 0)])
def test_a_loop_whose_gradients_nobody_reduces_ends_after_one_step(ranks, way, ends):
    for step, message in ranks(2, plain_loop, way):
        assert step == ends
        assert not message or ("differs between ranks" in message and "not wrapped" in message and "all-reduce" in message)


class Signal(TrainerCallback):
    """SIGTERM to this process at an event of the Trainer, once a step has been reached; on one rank only, or on all."""

    def __init__(self, event, step, rank=None, times=1):
        self.step, self.rank, self.times = step, rank, times
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step >= self.step and self.times and self.rank in (None, args.process_index):
            self.times -= 1
            os.kill(os.getpid(), signal.SIGTERM)


def signalled(directory, engine, event=None, step=2, rank=None, times=1, resume=None, **changes):
    run = replace(RUN, steps=7, accumulation=2)
    with fresh_accelerate():
        saving = {"enable_jit_checkpoint": True, "save_strategy": "no", **changes}
        callbacks = [] if event is None else [Signal(event, step, rank, times)]
        recorder = Recorder()
        trainer = recorder.trainer = trainer_of(str(directory), engine, run, callbacks=[recorder, *callbacks], **saving)
        before = signal.getsignal(signal.SIGTERM)
        trainer.train(resume_from_checkpoint=resume)
        assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL
        result = result_of(trainer) | {"history": recorder.history, "steps": trainer.state.global_step}
        close(trainer)
        return result


EVENTS = {
    "in a micro-batch": ("on_substep_end", 3),
    "before the optimizer": ("on_pre_optimizer_step", 3),
    "after a step": ("on_step_end", 2),
    "in an evaluation": ("on_prediction_step", 3),
}


@pytest.mark.parametrize("place", only(["in a micro-batch", "before the optimizer", "in an evaluation"], EVENTS.keys()))
def test_a_signal_saves_at_the_end_of_a_step_and_the_run_goes_on_bit_for_bit(tmp_path, place):
    event, saved = EVENTS[place]
    evaluating = {"eval_strategy": "steps", "eval_steps": 1} if "evaluation" in place else {}
    undisturbed = signalled(tmp_path / "other", "one", **evaluating)
    stopped = signalled(tmp_path, "one", event, times=2, **evaluating)
    assert stopped["steps"] == saved and [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    resumed = signalled(tmp_path, "one", resume=True, **evaluating)
    history = [entry for entry in undisturbed["history"] if entry[0] >= saved]
    assert_same_run(resumed, undisturbed | {"history": history}, tolerance=0.0)


@pytest.mark.parametrize("engine", ["ddp", slow("zero3")])
def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(ranks, tmp_path, engine):
    found = ranks(2, signalled, tmp_path, engine, "on_substep_end", 2, 1)
    assert [result["steps"] for result in found] == [3, 3]
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()
    assert [result["steps"] for result in ranks(2, signalled, tmp_path, engine, resume=True)] == [7, 7]


def test_a_signal_for_which_nothing_could_be_saved_is_refused_at_start(tmp_path):
    with pytest.raises(UnsupportedError, match="enable_jit_checkpoint=True with save_only_model=True"):
        signalled(tmp_path, "one", save_strategy="steps", save_only_model=True)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
