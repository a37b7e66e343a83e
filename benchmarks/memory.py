"""Memory: peak of the process, bytes kept for backward, and bytes of master values, moments and gradients.

    python -m benchmarks.memory [--dtype fp32 bf16] [--methods losia lora64 full ...] [--batch 2 --length 512] [--json FILE]

Every method runs a few steps in a process of its own; the peak is counted from after the model is built (resident memory on
the CPU, allocated memory on a GPU). Bytes kept for backward are what autograd packs while a target linear's forward runs,
parameters aside. They are counted per layer, and once more with tensors that several layers keep in common (q, k and v read
one input) counted once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, bar, bar_table, header, table, write_json
from benchmarks.methods import RANK_FACTOR, Method, NotInstalledError, floor
from benchmarks.shapes import DTYPES, Shape, add_shape_options, shape_from
from benchmarks.step_time import METHODS

DEFAULT = ("floor", "losia", "localizing", "lora", "lora16", "lora64", "dora", "galore", "full", "full-master", "plain", "pro")
_STEPS = 3


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--methods", choices=["floor", *METHODS], nargs="+", default=list(DEFAULT))
    add_shape_options(parser)
    parser.add_argument("--json", default=str(RESULTS / "memory.json"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one method, in this process: what every subprocess is given
    options = parser.parse_args(arguments)
    if options.alone:
        shape = shape_from(options, options.dtype[0])
        print(json.dumps(measure(shape, options.alone)))
        return []
    print(header())
    results = []
    for dtype in options.dtype:
        shape = shape_from(options, dtype)
        found = {name: in_own_process(shape, name) for name in options.methods}
        found = {name: entry for name, entry in found.items() if "missing" not in entry}
        results.append({"shape": shape.to_dict(), "methods": found, "bars": _bars(found)})
        print(f"\n{shape}; MB\n{as_table(found)}\n\n{bar_table(results[-1]['bars'])}", flush=True)
    write_json(options.json, results)
    return results


def in_own_process(shape: Shape, name: str) -> dict[str, Any]:
    """`measure` in a fresh Python process, so that nothing that ran before it is counted."""
    arguments = ["--alone", name, "--dtype", shape.dtype]
    for option, value in shape.to_dict().items():
        if option == "dtype":
            continue
        flag = f"--{option.replace('_', '-')}"
        arguments += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "missing" in result:
        print(f"{name}: not measured: {result['missing']}")
    return result


def measure(shape: Shape, name: str) -> dict[str, Any]:
    """Bytes of one method, by this process: the peak, what is kept for backward, and the state by kind."""
    try:
        method = floor(shape) if name == "floor" else METHODS[name](shape)
    except NotInstalledError as error:
        return {"missing": str(error)}
    tokens = shape.tokens()
    reset_peak(shape.device)
    for _ in range(_STEPS):
        method.step(tokens)
    peak = peak_bytes(shape.device)
    gradients = _gradient_bytes(method)
    kept = Kept(method.model)
    with kept:
        method.step(tokens)
    found = {"name": method.name, "peak": peak, "kept": kept.per_layer, "kept_once": kept.once, "kept_by_model": kept.whole}
    return {**found, **state_bytes(method), "gradients": gradients}


def reset_peak(device: str) -> None:
    """Begin counting the peak anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: str) -> int:
    """Most memory since `reset_peak`: resident (Linux), or allocated on the GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


class Kept:
    """Counts what autograd keeps for backward in one step: inside target linears, and in the whole model."""

    def __init__(self, model: nn.Module) -> None:
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._layers = _targets(inner.model.layers)
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._parameters |= {b.untyped_storage().data_ptr() for b in model.buffers()}
        self._inside = False
        self._once: dict[int, int] = {}
        self._whole: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no storage's address is used twice
        self.per_layer = 0

    @property
    def once(self) -> int:
        return sum(self._once.values())

    @property
    def whole(self) -> int:
        return sum(self._whole.values())

    def __enter__(self) -> None:
        self._handles = [layer.register_forward_pre_hook(self._enter_layer) for layer in self._layers]
        self._handles += [layer.register_forward_hook(self._leave_layer) for layer in self._layers]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._alive.clear()

    def _enter_layer(self, *_: Any) -> None:
        self._inside = True

    def _leave_layer(self, *_: Any) -> None:
        self._inside = False

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters and tensor.dtype.is_floating_point:
            self._alive.append(tensor.detach())
            self._whole[storage.data_ptr()] = storage.nbytes()
            if self._inside:
                self._once[storage.data_ptr()] = storage.nbytes()
                self.per_layer += storage.nbytes()
        return tensor


def _targets(decoder: nn.Module) -> list[nn.Module]:
    """What stands in each dense linear's place: an adapter's whole wrapper, or the linear itself."""
    modules = dict(decoder.named_modules())
    wrappers = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "base_layer"))
    found = []
    for name, module in modules.items():
        if f"{name}." in wrappers or (isinstance(module, nn.Linear) and not name.startswith(wrappers)):
            found.append(module)
    return found


def state_bytes(method: Method) -> dict[str, int]:
    """Bytes of master values (fp32 copies, or the trained parameters themselves where they need none) and of moments."""
    found = {"master": 0, "moments": 0}
    for group in method.optimizer.param_groups if method.optimizer is not None else []:
        for parameter in group["params"]:
            state = {key: value for key, value in method.optimizer.state[parameter].items() if torch.is_tensor(value)}
            found["master"] += _bytes(state.pop("master", parameter))
            found["moments"] += sum(_bytes(value) for value in state.values() if value.dim())
    return found


def _gradient_bytes(method: Method) -> int:
    """Gradients that stand together before the optimizer steps: those of every parameter that trains."""
    if method.optimizer is None:
        return 0
    return sum(_bytes(p) for group in method.optimizer.param_groups for p in group["params"])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bars(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    bars = []
    if "losia" in found and "full-master" in found:
        losia, full = found["losia"], found["full-master"]
        ratio = {key: losia[key] / full[key] for key in ("kept", "kept_once")}
        state = [sum(entry[key] for key in ("master", "moments", "gradients")) for entry in (losia, full)]
        bars.append(bar("master, moments, gradients / full fine-tuning's", state[0] / state[1], RANK_FACTOR**2 * 1.01))
        bars.append(bar("kept for backward by target linears / dense linears", ratio["kept"], RANK_FACTOR * 1.05))
    if "lora64" in found:
        for name in ("losia", "localizing"):
            if name in found:
                limit = found["lora64"]["peak"] / 1e6
                bars.append(bar(f"peak MB: {found[name]['name']}, below LoRA r = 64", found[name]["peak"] / 1e6, limit))
    return bars


def as_table(found: dict[str, dict[str, Any]]) -> str:
    """One line a method, in MB."""
    keys = ("peak", "kept_by_model", "kept", "kept_once", "master", "moments", "gradients")
    columns = ["method", "peak", "kept, model", "kept, linears", "each tensor once", "master", "moments", "gradients"]
    return table(columns, [[entry["name"], *(f"{entry[key] / 1e6:,.1f}" for key in keys)] for entry in found.values()])


if __name__ == "__main__":
    main()
