"""A loop over Accelerate's wrappers that saves with save_checkpoint in the place of accelerator.save_state, and resumes."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, load_checkpoint, losia_parameter_groups, save_checkpoint
from tests.support.models import tiny_llama
from tests.support.resume import everything
from tests.support.trainers import examples, fresh_accelerate
from tests.support.training import Run

RUN = Run(steps=9)
CONFIG = LoSiAConfig(rank_factor=0.25, period=3)


def loop(directory, resume=False, save_at=4):
    """Trains to the end; the global batch is RUN's, and each step has two micro-batches."""
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = get_losia_model(tiny_llama(attention_dropout=0.2), CONFIG)
        optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        # A generator of its own: otherwise the resumed loader's start would take one of the numbers that dropout is to get.
        own = torch.Generator().manual_seed(0)
        loader = DataLoader(examples(RUN), batch_size=RUN.batch // accelerator.num_processes // 2, generator=own)
        model, optimizer, scheduler, loader = accelerator.prepare(model.train(), optimizer, scheduler, loader)
        losia = LoSiA(model, optimizer.optimizer, CONFIG)
        parts = {"model": model, "optimizer": optimizer, "losia": losia, "scheduler": scheduler}
        done, losses = 0, []
        if resume:
            done = load_checkpoint(directory, **parts)["batches"]
            loader = accelerator.skip_first_batches(loader, done)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                losia.step()  # does nothing in micro-batches that the optimizer waits out
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            done += 1
            if accelerator.sync_gradients and losia.steps == save_at and not resume:
                save_checkpoint(directory, **parts, extra={"batches": done})
        result = {"losses": losses, "steps": losia.steps, "rates": losia.learning_rates(), "everything": everything(losia)}
        losia.detach()
        return result


@pytest.mark.parametrize("world", [1, 2])
def test_it_goes_on_bit_for_bit(ranks, tmp_path, world):
    def run(**settings):
        return [loop(tmp_path, **settings)] if world == 1 else ranks(world, loop, tmp_path, **settings)

    undisturbed = run()
    for ours, theirs in zip(run(resume=True), undisturbed, strict=True):
        assert ours["losses"] == theirs["losses"][8:]
        assert (ours["steps"], ours["rates"]) == (theirs["steps"], theirs["rates"])
        assert theirs["steps"] == RUN.steps
        assert ours["everything"].keys() == theirs["everything"].keys()
        assert [n for n, tensor in theirs["everything"].items() if not torch.equal(tensor, ours["everything"][n])] == []
