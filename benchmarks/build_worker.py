"""One build's side of `benchmarks.builds`: steps when it is asked to. Run by path, with that build first on PYTHONPATH.

Reads a setting as a line of JSON, then names of methods ("floor", "losia", "end"), a line each; a line of JSON answers each.
Imports nothing of `benchmarks`: the other build has one of its own.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    warnings.simplefilter("ignore")
    setting = json.loads(sys.stdin.readline())
    torch.set_num_threads(setting["threads"])
    tokens = torch.randint(0, setting["model"]["vocab_size"], setting["batch"], generator=torch.Generator().manual_seed(1))
    methods = {"floor": floor(setting), "losia": losia(setting)}
    print(json.dumps({"kept": kept_bytes(methods["losia"], tokens)}), file=answers, flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name == "end":
            break
        gc.collect()
        began = time.perf_counter()
        ended_slot = methods[name](tokens)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "ended_slot": bool(ended_slot), "peak": peak_bytes()}), file=answers, flush=True)


def made(setting: dict[str, Any]) -> Any:
    """A Llama with random weights, the same in every build."""
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[setting["dtype"]])
    try:
        return LlamaForCausalLM(LlamaConfig(**setting["model"], attn_implementation="sdpa")).train()
    finally:
        torch.set_default_dtype(torch.float32)


def floor(setting: dict[str, Any]) -> Any:
    model = made(setting).requires_grad_(False)
    model.enable_input_require_grads()

    def step(tokens: torch.Tensor) -> bool:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return False

    return step


def losia(setting: dict[str, Any]) -> Any:
    config = LoSiAConfig.from_dict(setting["config"])
    model = get_losia_model(made(setting), config)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-5), lr=1e-5)
    conductor = LoSiA(model, optimizer, config)

    def step(tokens: torch.Tensor) -> bool:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        relocalized = conductor.step()
        optimizer.zero_grad(set_to_none=True)
        return relocalized

    step.model = model  # type: ignore[attr-defined]
    return step


def kept_bytes(step: Any, tokens: torch.Tensor) -> int:
    """Bytes that a step's forward keeps for backward in target linears, parameters aside, each tensor once."""
    layers = [module for module in step.model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    weights = {p.untyped_storage().data_ptr() for p in [*step.model.parameters(), *step.model.buffers()]}
    inside, kept, alive = [False], {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    handles = [layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)) for layer in layers]
    handles += [layer.register_forward_hook(lambda *_: inside.__setitem__(0, False)) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(tokens)
    for handle in handles:
        handle.remove()
    return sum(kept.values())


def peak_bytes() -> int:
    """Most resident memory of this process so far (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    main()
