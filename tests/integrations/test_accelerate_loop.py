"""A loop over Accelerate's wrappers resumes bit for bit, with save_checkpoint or with accelerator.save_state; nothing stale
is ever written in silence."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ProjectConfiguration
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from losia_dist import (
    LoSiA,
    LoSiAAdamW,
    LoSiAConfig,
    export_model,
    get_losia_model,
    load_checkpoint,
    losia_parameter_groups,
    save_checkpoint,
)
from losia_dist.errors import CheckpointError, ConfigError, UnsupportedError
from losia_dist.integrations.accelerate.carried_state import MARKER, carry_state
from tests.support.cases import slow
from tests.support.models import tiny_llama
from tests.support.resume import everything
from tests.support.trainers import examples, fresh_accelerate
from tests.support.training import Run

RUN = Run(steps=9)
CONFIG = LoSiAConfig(rank_factor=0.25, period=3)


def accelerator_for(engine, project, layer="LlamaDecoderLayer", passes=2):
    """`engine`: "torch" (one process or DDP), "zero2", "zero3", or "fsdp2", which Accelerate would drop on a CPU.

    passes: micro-batches of a step, on 2 ranks.
    """
    zero_stage = int(engine[-1]) if engine.startswith("zero") else None
    settings = {"cpu": zero_stage is None, "gradient_accumulation_steps": passes}  # with cpu=True Accelerate drops DeepSpeed
    if project is not None:
        naming = ProjectConfiguration(project_dir=str(project), automatic_checkpoint_naming=True, total_limit=2)
        settings["project_config"] = naming
    if zero_stage is not None:
        zero = {"zero_optimization": {"stage": zero_stage}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
        zero |= {"train_micro_batch_size_per_gpu": RUN.batch // 2 // passes, "gradient_accumulation_steps": passes}
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero), **settings)
    accelerator = Accelerator(**settings)
    if engine == "fsdp2":
        layers = {"fsdp_version": 2, "transformer_cls_names_to_wrap": [layer]}
        state = accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False, **layers
        )
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


class Loop:
    """A run before its first step; the global batch is RUN's, and each step has two micro-batches."""

    def __init__(self, engine="torch", project=None, carried=True):
        self.accelerator = accelerator_for(engine, project)
        model = get_losia_model(tiny_llama(attention_dropout=0.2), CONFIG)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        # A generator of its own: otherwise the resumed loader's start would take one of the numbers that dropout is to get.
        own = torch.Generator().manual_seed(0)
        loader = DataLoader(examples(RUN), batch_size=RUN.batch // self.accelerator.num_processes // 2, generator=own)
        prepared = self.accelerator.prepare(model.train(), optimizer, scheduler, loader)
        self.model, self.optimizer, self.scheduler, self.loader = prepared
        if engine == "fsdp2":
            assert all(isinstance(p, DTensor) for p in self.model.parameters())
        if engine == "zero3":
            assert all(p.numel() == 0 for p in self.model.parameters() if not p.ds_persist)
            assert any(p.numel() == 0 for p in self.model.parameters())
        assert (self.accelerator.distributed_type == DistributedType.DEEPSPEED) == engine.startswith("zero")
        self.losia = LoSiA(self.model, self.optimizer.optimizer, CONFIG)
        if carried:
            carry_state(self.accelerator, self.losia)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "losia": self.losia, "scheduler": self.scheduler}
        self.done = 0

    def train(self, after_step=lambda: None):
        losses = []
        loader = self.accelerator.skip_first_batches(self.loader, self.done) if self.done else self.loader
        for batch in loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.losia.step()  # does nothing in micro-batches that the optimizer waits out
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
            self.done += 1
            if self.accelerator.sync_gradients:
                after_step()
        return losses

    def end(self, losses):
        rates = self.losia.learning_rates()
        result = {"losses": losses, "steps": self.losia.steps, "rates": rates, "everything": everything(self.losia)}
        self.losia.detach()
        if hasattr(self.model, "destroy"):
            self.model.destroy()
        return result


def train_and_resume(directory, engine, saver):
    """An undisturbed run that saves at step 4, and one that goes on from there."""
    results = []
    for resumes in (False, True):
        with fresh_accelerate():
            loop = Loop(engine, carried=saver == "save_state")
            if resumes and saver == "save_state":
                loop.accelerator.load_state(directory / "fourth")
                loop.done = 8
            elif resumes:
                loop.done = load_checkpoint(directory, **loop.parts)["batches"]

            def after_step(loop=loop, resumes=resumes):
                if loop.losia.steps != 4 or resumes:
                    return
                if saver == "save_state":
                    loop.accelerator.save_state(directory / "fourth")
                else:
                    save_checkpoint(directory, **loop.parts, extra={"batches": loop.done})

            results.append(loop.end(loop.train(after_step)))
    return results


CASES = [
    ("torch", 1, "save_checkpoint"),
    slow("torch", 2, "save_checkpoint"),
    ("torch", 1, "save_state"),
    ("torch", 2, "save_state"),
    ("zero2", 2, "save_state"),
    slow("zero3", 2, "save_state"),
    ("fsdp2", 2, "save_state"),
]


@pytest.mark.parametrize("engine, world, saver", CASES)
def test_it_goes_on_bit_for_bit(ranks, tmp_path, engine, world, saver):
    arguments = (tmp_path, engine, saver)
    results = [train_and_resume(*arguments)] if world == 1 else ranks(world, train_and_resume, *arguments)
    for theirs, ours in results:
        assert ours["losses"] == theirs["losses"][8:] and len(ours["losses"]) == 10
        assert (ours["steps"], ours["rates"]) == (theirs["steps"], theirs["rates"])
        assert theirs["steps"] == RUN.steps
        assert ours["everything"].keys() == theirs["everything"].keys()
        assert [n for n, tensor in theirs["everything"].items() if not torch.equal(tensor, ours["everything"][n])] == []
    if saver == "save_state":
        assert not list((tmp_path / "fourth").glob("*model*")) and not list((tmp_path / "fourth").glob("*optimizer*"))
        export_model(tmp_path / "fourth", tmp_path / "exported")
        assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_numbered_checkpoints_are_rotated_and_the_newest_complete_one_is_loaded(tmp_path):
    with fresh_accelerate():
        loop = Loop(project=tmp_path)
        losses = loop.train(lambda: loop.accelerator.save_state() if loop.losia.steps % 2 == 0 else None)
        undisturbed = loop.end(losses)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_2", "checkpoint_3"]
    state = tmp_path / "_losia_state"
    assert sorted(p.name for p in state.glob("checkpoint_*")) == ["checkpoint_2", "checkpoint_3"]
    (tmp_path / "checkpoints" / "checkpoint_3" / MARKER).unlink()  # cut off in the middle
    with fresh_accelerate():
        loop = Loop(project=tmp_path)
        loop.accelerator.load_state()
        assert loop.losia.steps == 6
        loop.done = 12
        result = loop.end(loop.train())
        assert result["losses"] == undisturbed["losses"][12:]
        assert [n for n, t in undisturbed["everything"].items() if not torch.equal(t, result["everything"][n])] == []
    for place in (tmp_path, tmp_path / "checkpoints" / "checkpoint_2"):
        assert export_model(place, tmp_path / "model").is_dir()


def test_halves_that_were_not_saved_together_are_refused(tmp_path):
    with fresh_accelerate():
        loop = Loop()
        loop.accelerator.save_state(tmp_path / "a")
        kept = shutil.copytree(tmp_path / "a", tmp_path / "kept")
        loop.train()
        loop.accelerator.save_state(tmp_path / "a")
        before = everything(loop.losia)
        shutil.copy(kept / MARKER, tmp_path / "a" / MARKER)
        for name, words in (
            ("a", "is missing or another one"),
            ("kept", "is missing or another one"),
            ("b", "has no losia_state"),
        ):
            with pytest.raises(CheckpointError, match=words):
                loop.accelerator.load_state(tmp_path / name)
        with pytest.raises(UnsupportedError, match="exclude_frozen_parameters: LoSiA's state is written"):
            loop.accelerator.save_state(tmp_path / "c", exclude_frozen_parameters=True)
        loop.model(**next(iter(loop.loader))).loss.backward()
        with pytest.raises(CheckpointError, match="middle of an optimizer step"):
            loop.accelerator.save_state(tmp_path / "c")
        with pytest.raises(ConfigError, match="needs output_dir"):
            loop.accelerator.save_state()
        assert not (tmp_path / "c").exists()
        after = everything(loop.losia)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        loop.losia.detach()


def saving_without_carry_state(directory, engine):
    with fresh_accelerate():
        loop = Loop(engine, carried=False)
        accelerator, told = loop.accelerator, {}
        calls = {
            "save_state": lambda: accelerator.save_state(directory / "state"),
            "load_state": lambda: accelerator.load_state(directory),
            "save_model": lambda: accelerator.save_model(loop.model, directory / "model"),
            "get_state_dict": lambda: accelerator.get_state_dict(loop.model),
        }
        for name, call in calls.items():
            with pytest.raises(UnsupportedError) as caught:
                call()
            told[name] = str(caught.value)
        plain = torch.nn.Linear(2, 2)
        assert accelerator.get_state_dict(plain, unwrap=False).keys() == plain.state_dict().keys()
        loop.end([])
        return told


@pytest.mark.parametrize("engine, world", [("torch", 1), ("zero2", 2)])
def test_what_accelerate_would_write_stale_is_refused_before_it_writes(ranks, tmp_path, engine, world):
    arguments = (tmp_path, engine)
    for told in (
        [saving_without_carry_state(*arguments)] if world == 1 else ranks(world, saving_without_carry_state, *arguments)
    ):
        assert "carry_state(accelerator, losia)" in told["save_state"] and "save_checkpoint" in told["load_state"]
        assert "export_model(losia, directory)" in told["save_model"] and "export_model" in told["get_state_dict"]
    assert list(tmp_path.iterdir()) == []


def test_a_marker_names_the_entry_that_was_saved_with_it(tmp_path):
    with fresh_accelerate():
        loop = Loop()
        loop.accelerator.save_state(tmp_path / "a")
        told = json.loads((tmp_path / "a" / MARKER).read_text())
        complete = json.loads((tmp_path / "_losia_state" / "a" / "COMPLETE").read_text())
        assert told == {"manifest_crc32": complete["manifest_crc32"]}
        loop.losia.detach()
