"""A tiny model and word-level tokenizer in a directory, and conversations small enough for TRL's trainers on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.support.models import tiny_llama

WORDS = [f"w{place}" for place in range(90)]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"


def save_tiny_model(directory: Path, **overrides: Any) -> str:
    """Write a Llama of 97 words with its tokenizer; returns the directory's name."""
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    model = tiny_llama(**overrides)
    model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id = 0, 1, None
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.generation_config.bos_token_id = None
    model.save_pretrained(directory)
    return str(directory)


def conversations(count: int) -> list[dict[str, Any]]:
    """Prompt and completion, for SFTTrainer: the answer to a word is the next one, twice."""
    return [
        {"prompt": f"{WORDS[i % 40]} {WORDS[(i + 3) % 40]}", "completion": f" {WORDS[i % 40 + 1]} {WORDS[i % 40 + 1]}"}
        for i in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    """Prompt, chosen and rejected, for DPOTrainer."""
    return [
        {
            "prompt": f"{WORDS[i % 40]} {WORDS[(i + 3) % 40]}",
            "chosen": f" {WORDS[i % 40 + 1]} {WORDS[50]}",
            "rejected": f" {WORDS[i % 40 + 2]} {WORDS[60]}",
        }
        for i in range(count)
    ]
