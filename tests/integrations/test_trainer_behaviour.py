"""What a user of LoSiATrainer sees beside the losses: evaluations, the best model, saved directories, logs, skipped steps."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from losia_dist import (
    LoSiAAdamW,
    LoSiACallback,
    LoSiAConfig,
    LoSiATrainer,
    export_model,
    get_losia_model,
    losia_parameter_groups,
)
from losia_dist.errors import ConfigError
from tests.support import training
from tests.support.cases import only, slow
from tests.support.compare import assert_same_run
from tests.support.models import tiny_llama
from tests.support.trainers import arguments, examples, fresh_accelerate, linear_rate, train_with_trainer
from tests.support.training import Run, reference

SHORT = Run(steps=8, config={"rank_factor": 0.25, "output_rank_factor": 0.25, "period": 2})
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3}
ENGINES = ("one", "ddp", "zero2", "zero3", "fsdp2")


def train_on(ranks, tmp_path, engine, run, **changes):
    if engine == "one":
        return [train_with_trainer(str(tmp_path), engine, run, **changes)]
    return ranks(2, train_with_trainer, str(tmp_path), engine, run, **changes)


@pytest.mark.parametrize("engine", ["one", slow("zero3"), slow("fsdp2")])
def test_an_evaluation_in_the_middle_changes_nothing_at_all(ranks, tmp_path, engine):
    undisturbed = train_on(ranks, tmp_path, engine, SHORT)
    evaluated = train_on(ranks, tmp_path, engine, SHORT, eval_on_start=True, **EVALUATING)
    assert sum("eval_loss" in entry for entry in evaluated[0]["log"]) == 4  # at the start, after steps 3 and 6, at the end
    for result, wanted in zip(evaluated, undisturbed, strict=True):
        assert_same_run(result, wanted, tolerance=0.0)


def evaluate_again(trainer):
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("engine", only(["one", "zero3"], ENGINES))
def test_the_best_model_comes_back_at_the_end_and_computes_what_it_did(ranks, tmp_path, engine):
    # The loss falls, so that the greatest one belongs to the first evaluation.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    saving = {"save_strategy": "steps", "save_steps": 3, **EVALUATING, **best}
    for result in train_on(ranks, tmp_path, engine, replace(SHORT, max_grad_norm=0.5), inspect=evaluate_again, **saving):
        first, second = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry][:2]
        assert first != second
        assert math.isclose(result["inspected"], first, rel_tol=1e-6)
        saved = dict(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-3").named_parameters())
        assert result["weights"].keys() == saved.keys()
        for name, weight in saved.items():
            assert torch.equal(result["weights"][name], weight), name


def save_model(trainer):
    trainer.save_model()


@pytest.mark.parametrize(
    "engine, tied",
    [("one", False), ("one", True), ("zero3", False), ("fsdp2", True)]
    + [pytest.param(engine, tied, marks=pytest.mark.slow) for engine, tied in [("zero3", True), ("fsdp2", False)]],
)
def test_the_saved_directory_is_a_plain_model_with_the_trained_weights(ranks, tmp_path, engine, tied):
    run = replace(SHORT, steps=5, model={"tie_word_embeddings": tied})
    saving = {"save_strategy": "steps", "save_steps": 5, "save_only_model": True}
    for result in train_on(ranks, tmp_path, engine, run, inspect=save_model, **saving):
        plain, loading = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values()), loading
        assert plain.config.architectures == ["LlamaForCausalLM"]
        for name, weight in plain.named_parameters(remove_duplicate=False):
            assert torch.equal(result["weights"][name], weight), name
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
        during = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-5").state_dict()  # in training, after the last step
        assert all(torch.equal(during[name], tensor) for name, tensor in plain.state_dict().items())
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, tiny_llama(**run.model).model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("engine", only(["one"], ENGINES))
def test_the_logged_rates_and_the_gradient_norm_are_the_true_ones(ranks, tmp_path, engine):
    run = replace(SHORT, max_grad_norm=0.05, accumulation=2)
    norms = norms_of_the_first_gradient(run)
    for result in train_on(ranks, tmp_path, engine, run):
        entries = [entry for entry in result["log"] if "loss" in entry]
        assert math.isclose(entries[0]["grad_norm"], norms, rel_tol=1e-5)  # before clipping
        names = [key.rsplit("/", 1)[-1] for key in entries[0] if key.startswith("losia/learning_rate/")]
        assert names == ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]
        for step, entry in enumerate(entries):
            assert math.isclose(entry["learning_rate"], linear_rate(step, run.steps), abs_tol=1e-12)
            assert entry["losia/localizing"] == step // 2 % 4
            for place, name in enumerate(names):
                since = step - 2 * (place + 1)  # the group's slot ended with step 2 * place + 1
                ramp = min(1.0, (since + 1) / 2) if since >= 0 else 1.0
                assert math.isclose(entry[f"losia/learning_rate/{name}"], ramp * linear_rate(step, run.steps), abs_tol=1e-12), (
                    step,
                    name,
                )


def norms_of_the_first_gradient(run):
    """Norm of the mean gradient of the first step, in the subnets' places, by plain autograd."""
    converted = get_losia_model(tiny_llama(**run.model), LoSiAConfig(**run.config))
    places = {n: (m.row_index, m.col_index) for n, m in converted.named_modules() if hasattr(m, "subnet")}
    model = tiny_llama(**run.model)
    for batch in training.global_batches(run)[0]:
        (model(**batch).loss / run.accumulation).backward()
    parts = [model.get_submodule(n).weight.grad[rows][:, columns] for n, (rows, columns) in places.items()]
    return torch.cat([part.flatten() for part in parts]).norm().item()


class SkipOnce(TrainerCallback):
    """The optimizer does nothing in one step, as an engine does whose gradients overflowed."""

    def __init__(self, step):
        self.step, self.optimizer = step, None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == self.step:
            optimizer.step = lambda: None
        elif state.global_step == self.step + 1:
            del optimizer.step


def test_a_skipped_step_moves_neither_the_clock_nor_the_importance(tmp_path):
    """The run equals one that never saw the skipped step's data."""
    config = LoSiAConfig(rank_factor=0.25, period=3)
    run = replace(SHORT, steps=7)
    data = examples(run)
    runs = {}
    for name, skipped in (("skipping", 4), ("without", None)):
        with fresh_accelerate():
            steps = run.steps if skipped is not None else run.steps - 1
            rows = data if skipped is not None else data[: 4 * run.batch] + data[5 * run.batch :]
            args = arguments(str(tmp_path), run, max_steps=steps, lr_scheduler_type="constant")
            callbacks = [] if skipped is None else [SkipOnce(skipped)]
            trainer = LoSiATrainer(tiny_llama(), args, train_dataset=rows, losia_config=config, callbacks=callbacks)
            trainer.train()
        runs[name] = (trainer.losia.steps, {n: t.clone() for n, t in trainer.model.state_dict().items()})
    assert runs["skipping"][0] == runs["without"][0] == 6
    for name, tensor in runs["without"][1].items():
        assert torch.equal(runs["skipping"][1][name], tensor), name


def test_the_callback_alone_drives_a_plain_trainer(tmp_path, monkeypatch):
    config = LoSiAConfig(**SHORT.config)
    model = get_losia_model(tiny_llama(), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=training.RATE), lr=training.RATE)
    callback = LoSiACallback(config)
    with fresh_accelerate():
        trainer = Trainer(
            model,
            arguments(str(tmp_path), SHORT),
            train_dataset=examples(SHORT),
            optimizers=(optimizer, None),
            callbacks=[callback],
        )
        trainer.train()
    monkeypatch.setattr(training, "rate_at", linear_rate)
    expected = reference(SHORT)
    export_model(callback.losia, tmp_path)
    for name, weight in LlamaForCausalLM.from_pretrained(tmp_path).named_parameters():
        assert (weight - expected["weights"][name]).abs().max() < 1e-5, name


def test_the_callback_alone_refuses_checkpoints_that_would_be_stale(tmp_path):
    config = LoSiAConfig(rank_factor=0.25)
    for callback, saving, words in (
        (LoSiACallback(config), "steps", "save_strategy='steps'.*Use LoSiATrainer"),
        (LoSiACallback(), "no", r"no configuration: use LoSiACallback\(losia_config\)"),
    ):
        with fresh_accelerate(), pytest.raises(ConfigError, match=words):
            model = get_losia_model(tiny_llama(), config)
            optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3))
            args = arguments(str(tmp_path), SHORT, save_strategy=saving)
            Trainer(model, args, train_dataset=examples(SHORT), optimizers=(optimizer, None), callbacks=[callback]).train()


def test_an_optimizer_that_was_passed_is_used_as_it_is(tmp_path):
    config = LoSiAConfig(rank_factor=0.25, period=2)
    model = get_losia_model(tiny_llama(), config)
    optimizer = torch.optim.SGD(losia_parameter_groups(model, lr=1e-2), lr=1e-2, momentum=0.9)
    with fresh_accelerate():
        args = arguments(str(tmp_path), SHORT, optim="sgd")
        trainer = LoSiATrainer(model, args, train_dataset=examples(SHORT), losia_config=config, optimizers=(optimizer, None))
        trainer.train()
        assert trainer.losia.state.optimizer is optimizer
        assert trainer.losia.steps == SHORT.steps
        assert {group["lr"] for group in optimizer.param_groups} == {0.0}  # the linear schedule has ended


def test_settings_of_the_arguments_reach_the_optimizer_and_norms_are_not_decayed(tmp_path):
    with fresh_accelerate():
        args = arguments(str(tmp_path), SHORT, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7)
        config = LoSiAConfig(rank_factor=0.25, train_norms=True, train_embeddings=True)
        trainer = LoSiATrainer(tiny_llama(), args, train_dataset=examples(SHORT), losia_config=config)
        groups = trainer.create_optimizer().param_groups
    assert {(g["betas"], g["eps"], g["lr"]) for g in groups} == {((0.8, 0.95), 1e-7, training.RATE)}
    by_decay = {decay: [p for g in groups if g["weight_decay"] == decay for p in g["params"]] for decay in (0.1, 0.0)}
    assert {p.dim() for p in by_decay[0.1]} == {2}
    assert {p.dim() for p in by_decay[0.0]} == {1}
    assert len(by_decay[0.0]) == 2 * 3 + 1


def test_training_twice_goes_on_from_the_trained_weights(tmp_path):
    with fresh_accelerate():
        args = arguments(str(tmp_path), SHORT, lr_scheduler_type="constant")
        data, config = examples(SHORT), LoSiAConfig(rank_factor=0.5, period=2)
        trainer = LoSiATrainer(tiny_llama(), args, train_dataset=data[:4] * SHORT.steps, losia_config=config)
        trainer.train()
        first, losses = trainer.losia, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.train()
        again = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.losia is not first
    assert trainer.losia.steps == SHORT.steps == len(again)
    assert again[0] < losses[-1]  # one sequence of falling losses over both
