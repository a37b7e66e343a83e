"""Models of Qwen2.5's shape with random weights, written to the disk shard by shard: one shard's largest weight in memory."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen2Config

from losia_dist.checkpoint.atomic_files import Entry, TensorWriter

# tiny and small are for rehearsals: the quickstart's vocabulary, so that the embeddings' share is a 7B's.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 3, "hidden": 512, "inner": 512, "heads": 4, "kv_heads": 2, "vocabulary": 49152},
    "small": {"layers": 24, "hidden": 896, "inner": 4864, "heads": 14, "kv_heads": 2, "vocabulary": 49152},
    "7b": {"layers": 28, "hidden": 3584, "inner": 18944, "heads": 28, "kv_heads": 4, "vocabulary": 152064},
}
SHARD = 1_000_000_000  # bytes; a larger weight has a shard of its own


def configuration(scale: str) -> Qwen2Config:
    """Of a model whose tokens end as the quickstart's tokenizer ends them."""
    shape = SHAPES[scale]
    return Qwen2Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )


def write_model(directory: Path, scale: str, tokenizer: Path) -> int:
    """Write it, or whatever of it is missing; returns bytes of weights. Equal bits whenever it is written.

    Args:
        tokenizer: a directory whose tokenizer and generation configuration are copied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = configuration(scale)
    config.save_pretrained(directory)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens", "generation_config", "vocab", "merges")):
            shutil.copy(path, directory / path.name)
    shards = _shards(config)
    names = [f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors" for place in range(len(shards))]
    for place, (name, entries) in enumerate(zip(names, shards, strict=True)):
        if not (directory / name).exists():
            _write_shard(directory / name, entries, config.initializer_range, seed=place)
    size = sum(entry.size for entries in shards for entry in entries.values())
    index = {"metadata": {"total_size": size}, "weight_map": {w: n for n, e in zip(names, shards, strict=True) for w in e}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return size


def drop_weights(directory: Path) -> None:
    """Leave all but the weights, which `write_model` makes again."""
    for path in directory.glob("model-*.safetensors"):
        path.unlink()


def prints(directory: Path) -> dict[str, int]:
    """CRC-32 of the bytes of every weight of a model directory, by name; they are mapped, not held."""
    found: dict[str, int] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                data: Any = opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
                found[name] = zlib.crc32(memoryview(data))
    return found


def _shards(config: Qwen2Config) -> list[dict[str, Entry]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: list[dict[str, Entry]] = [{}]
    for name, parameter in model.named_parameters():
        entry = Entry(torch.bfloat16, tuple(parameter.shape))
        if shards[-1] and sum(one.size for one in shards[-1].values()) + entry.size > SHARD:
            shards.append({})
        shards[-1][name] = entry
    return shards


def _write_shard(path: Path, entries: dict[str, Entry], spread: float, seed: int) -> None:
    """Matrices normal, as Transformers begins them; norms 1, biases 0. The file has its name once it is whole."""
    generator, beside = torch.Generator().manual_seed(seed), path.with_suffix(".incomplete")
    beside.unlink(missing_ok=True)
    writer = TensorWriter(beside, entries, {"format": "pt"})
    try:
        for name in writer.order:
            values = torch.empty(entries[name].shape, dtype=entries[name].dtype)
            if values.dim() == 2:
                values.normal_(0.0, spread, generator=generator)
            else:
                values.fill_(0.0 if name.endswith("bias") else 1.0)
            writer.write(name, values)
        writer.close()
    finally:
        writer.abandon()
    beside.replace(path)
