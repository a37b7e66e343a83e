"""Bytes that each rank sends in one optimizer step, for LoSiA and for full fine-tuning, counted at the collectives.

    python -m benchmarks.communication [--ranks 2] [--layers 30] [--hidden 64] [--json FILE]

Every c10d operation of a step is caught by a dispatch mode on its way to the process group, with the size of its tensors
and the group it runs on. A ring sends 2 (N - 1) / N of an all-reduce's bytes, (N - 1) / N of a reduce-scatter's or an
all-gather's whole tensor; that is what is shown. Localization is told apart by LoSiA's own process group.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import header, on_ranks, table, write_json
from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups
from losia_dist.integrations.deepspeed.initialize import initialize_dense

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PERIOD = 2  # the second of two steps ends the slot, so that both kinds of step are seen


class Traffic(TorchDispatchMode):
    """Bytes a rank sends, by purpose: gradients, weights, localization (the full gradient's rows), selection."""

    def __init__(self, own_group: str | None) -> None:
        super().__init__()
        self.own_group, self.sent = own_group, defaultdict(float)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(("wait_tensor", "barrier")):
            self._count(name.split("::")[1].split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        world = dist.get_world_size()
        whole = max(_bytes(arg) for arg in args)  # of a gather's or a scatter's two sides, the whole one
        group = next((g for g in map(_group_name, args) if g), None)
        factor = (2 if name.startswith(("allreduce", "all_reduce")) else 1) * (world - 1) / world
        if self.own_group is not None and group == self.own_group:
            purpose = "localization" if "scatter" in name else "selection"
        else:
            purpose = "gradients" if "reduce" in name else "weights"
        self.sent[purpose] += whole * factor


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, list | tuple):
        return sum(_bytes(item) for item in argument)
    return 0


def _group_name(argument: Any) -> str | None:
    if isinstance(argument, torch.ScriptObject):
        try:
            return str(dist.ProcessGroup.unbox(argument).group_name)
        except RuntimeError:
            return None  # an option of the operation, not its group
    return None


def measure(engine_name: str, method: str, layers: int, hidden: int) -> dict[str, float]:
    """Bytes of the second step (a slot's last, so that a re-localization is in it). Runs on every rank."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4))
    config = LoSiAConfig(rank_factor=0.125, period=PERIOD)
    step, losia = _start(engine_name, method, model, config)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    step(tokens)
    own = losia.collectives.group if losia is not None else None
    with Traffic(None if own is None else str(own.group_name)) as traffic:
        step(tokens)
    return dict(traffic.sent)


def _start(engine_name: str, method: str, model: Any, config: LoSiAConfig) -> tuple[Any, LoSiA | None]:
    if engine_name.startswith("zero"):
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        zero = {"stage": int(engine_name[-1]), "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "zero_optimization": zero}
        if method == "losia":
            engine, *_ = initialize(model=model, losia_config=config, config=settings)
        else:
            engine, *_ = initialize_dense(model, settings, LoSiAAdamW(model.parameters()))

        def step(tokens: torch.Tensor) -> None:
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()

        return step, getattr(engine, "losia", None)
    if method == "losia":
        get_losia_model(model, config)
    if engine_name == "ddp":
        model = DistributedDataParallel(model, broadcast_buffers=False)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = losia_parameter_groups(model, lr=1e-4) if method == "losia" else list(model.parameters())
    optimizer = LoSiAAdamW(groups, lr=1e-4)
    losia = LoSiA(model, optimizer, config) if method == "losia" else None

    def plain_step(tokens: torch.Tensor) -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if losia is not None:
            losia.step()
        optimizer.zero_grad()

    return plain_step, losia


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes sent per rank and step, LoSiA beside full fine-tuning.")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    print(header())
    print(
        f"Llama, {options.layers} layers, hidden {options.hidden}, fp32, p = 1/8, {options.ranks} ranks; KB per rank and step"
    )
    rows, results = [], []
    for engine in options.engines:
        both = {m: on_ranks(options.ranks, measure, engine, m, options.layers, options.hidden) for m in ("full", "losia")}
        results.append({"engine": engine, **both})
        full, losia = both["full"], both["losia"]
        bytes_shown = [full["gradients"], *(losia[purpose] for purpose in ("gradients", "localization", "selection"))]
        rows.append(
            [
                engine,
                *(f"{value / 1024:,.1f}" for value in bytes_shown),
                f"1/{full['gradients'] / losia['gradients']:.1f}",
                f"1/{full['gradients'] / sum(bytes_shown[1:]):.1f}",
                *(f"{both[method].get('weights', 0.0) / 1024:,.0f}" for method in both),
            ]
        )
    columns = ["engine", "gradients, full", "gradients, LoSiA", "one layer's full gradient", "selection"]
    columns += ["gradients alone", "all of LoSiA's", "weights, full", "weights, LoSiA"]
    print(table(columns, rows))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
