"""Processes of `benchmarks.whole_life` in which Transformers works without this package's model: an export is loaded and its
held-out loss taken, and LoRA by PEFT trains on the same records. The package encodes the records, and no more.

    python -m benchmarks.whole_life_plain loss MODEL --records FILE
    python -m benchmarks.whole_life_plain lora MODEL --records FILE --steps 20

Each prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from losia_dist.data import build_dataset, load_records

RANK = 16


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loss", "lora"))
    parser.add_argument("model")
    parser.add_argument("--records", required=True)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = build_dataset(load_records(options.records), tokenizer, options.max_length)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    if options.what == "loss":
        say(held_out_loss=held_out_loss(model, examples))
    else:
        train_lora(model, examples, options.steps)


@torch.no_grad()
def held_out_loss(model: Any, examples: Any) -> float:
    """Mean loss per target token, in nats, as the training script takes it."""
    model.eval()
    total = count = 0.0
    for example in batches(examples, len(examples)):
        total += float(model(**example, use_cache=False, num_items_in_batch=1).loss)
        count += int((example["labels"][:, 1:] != -100).sum())
    return total / count


def train_lora(model: Any, examples: Any, steps: int) -> None:
    """PEFT's LoRA on every linear layer, with its defaults (fp32 adapters): one record a step."""
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    say(trainable_parameters=sum(p.numel() for p in trained))
    for step, batch in enumerate(batches(examples, steps), 1):
        began = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say(step=step, loss=loss.item(), seconds=time.perf_counter() - began)


def batches(examples: Any, count: int) -> Iterator[dict[str, Tensor]]:
    """One record each, int64 [1, n]: the first `count` of them, from the front again where there are fewer."""
    for place in range(count):
        example = examples[place % len(examples)]
        yield {name: example[name].unsqueeze(0) for name in ("input_ids", "labels")}


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
