"""What only a save would fail with is told before the first step; and what a resumed run does not go on with."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from losia_dist import LoSiAConfig, LoSiATrainer
from losia_dist.errors import ConfigError
from tests.support.cases import only, slow
from tests.support.models import tiny_llama
from tests.support.quantized import quantize
from tests.support.trainers import arguments, examples, fresh_accelerate
from tests.support.training import Run

RUN = Run(steps=3)
SAVING = {"save_strategy": "steps", "save_steps": 100}


class Steps(TrainerCallback):
    count = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.count += 1


class Unwritable:
    """A tokenizer whose files are gone."""

    def save_pretrained(self, directory):
        raise OSError("vocabulary not found")


def bad_generation(model):
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = False


CASES = {
    "generation": ({"change": bad_generation}, "temperature"),
    "generation, saved by hand later": ({"change": bad_generation, "save_strategy": "no"}, "temperature"),
    "tokenizer": ({"processing_class": Unwritable()}, "OSError: vocabulary not found"),
}


def train(directory, change=None, processing_class=None, model=None, data=None, resume=None, **settings):
    with fresh_accelerate():
        model = tiny_llama() if model is None else model
        if change is not None:
            change(model)
        steps = Steps()
        args = arguments(str(directory), RUN, **{**SAVING, **settings})
        config = LoSiAConfig(rank_factor=0.25, period=2, target_modules=["q_proj", "v_proj"])
        data = examples(replace(RUN, steps=4)) if data is None else data
        both = {"train_dataset": data, "eval_dataset": examples(RUN), "processing_class": processing_class}
        trainer = LoSiATrainer(model, args, losia_config=config, callbacks=[steps], **both)
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Exception as error:
            return steps.count, error
        return steps.count, None


@pytest.mark.parametrize("case", only(["generation", "tokenizer"], CASES.keys()))
def test_it_is_told_before_the_first_step(tmp_path, case):
    settings, words = CASES[case]
    steps, error = train(tmp_path, **settings)
    assert steps == 0 and isinstance(error, ConfigError)
    with pytest.raises(ConfigError, match=f"nothing of this run could be saved.*({words})"):
        raise error


def test_what_was_tried_leaves_nothing_behind(tmp_path):
    assert train(tmp_path, save_strategy="no") == (3, None)
    assert not list(tmp_path.glob(".trial-*")) and not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("best", [True, False])
def test_a_best_model_that_could_not_be_put_back_is_told_before_the_first_step(tmp_path, best):
    torch.manual_seed(0)
    shape = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_local_experts": 3, "vocab_size": 97}
    model = MixtralForCausalLM(MixtralConfig(**shape, num_attention_heads=3, num_key_value_heads=1))
    evaluating = {"eval_strategy": "steps", "eval_steps": 100, "load_best_model_at_end": best}
    steps, error = train(tmp_path, model=model, **evaluating)
    assert (steps, type(error)) == ((0, ConfigError) if best else (3, type(None))), error
    assert not best or "set load_best_model_at_end=False" in str(error)


def test_so_is_a_best_model_over_a_quantized_base(tmp_path):
    model = quantize(tiny_llama(hidden_size=48, intermediate_size=80), "nf4")
    steps, error = train(tmp_path, model=model, eval_strategy="steps", eval_steps=100, load_best_model_at_end=True)
    assert steps == 0 and isinstance(error, ConfigError), error
    assert "over a quantized base" in str(error) and "Set load_best_model_at_end=False" in str(error)


class Stream(IterableDataset):
    """Two batches of four a pass."""

    def __iter__(self):
        return iter(examples(replace(RUN, steps=2)))


@pytest.mark.parametrize(
    "stream, saved, skips, words",
    [
        slow(True, 1, True, None),
        (True, 3, True, "resuming in pass 2"),
        (False, 3, True, None),
        (False, 3, False, "data begins anew"),
    ],
)
def test_a_resume_says_where_the_data_does_not_go_on(tmp_path, caplog, stream, saved, skips, words):
    settings = {"data": Stream() if stream else None, "max_steps": saved, "save_steps": saved}
    assert train(tmp_path, **settings)[1] is None
    with caplog.at_level(logging.WARNING):
        error = train(tmp_path, **{**settings, "max_steps": 4}, resume=True, ignore_data_skip=not skips)[1]
    assert error is None
    said = [record.message for record in caplog.records if record.message.startswith("resuming")]
    assert len(said) == (words is not None) and (words is None or words in said[0])
