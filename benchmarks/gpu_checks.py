"""Tasks of the GPU run that check rather than measure: engines and collectives on NCCL with one rank. Prints JSON lines.

    python -m benchmarks.gpu_checks nccl|deepspeed [--rehearse]

Each engine trains a small model through re-localizations and must give the losses of the same training without an engine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ranks import free_port
from benchmarks.shapes import Shape
from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups
from losia_dist.ranks import compat

_STEPS, _RATE, _TOLERANCE = 8, 1e-3, 1e-4
_CONFIG = {"rank_factor": 0.25, "period": 2, "rewarm_steps": 0}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["nccl", "deepspeed"])
    parser.add_argument("--rehearse", action="store_true", help="gloo on the CPU instead of NCCL")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else "cuda"
    _start(device)
    shape = Shape(layers=3, hidden=128, intermediate=192, vocabulary=96, batch=2, length=16, device=device)
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = _losses(shape, "none")
    engines = ["zero2", "zero3"] if options.check == "deepspeed" else ["ddp", "fsdp2"]
    wrong = []
    for engine in engines:
        began = time.monotonic()
        losses = _losses(shape, engine)
        off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        wrong += [engine] if not off <= _TOLERANCE else []
        seconds = round(time.monotonic() - began, 2)
        print(
            json.dumps({"check": engine, "equal": off <= _TOLERANCE, "losses_differ_by": off, "seconds": seconds}), flush=True
        )
    if options.check == "nccl":
        print(json.dumps({"check": "collectives of localization", "equal": _collectives_agree(device)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(f"losses on {', '.join(wrong)} are not those of the same training without an engine")


def _start(device: str) -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo" if device == "cpu" else "nccl", rank=0, world_size=1)


def _losses(shape: Shape, engine_name: str) -> list[float]:
    """Losses of a few steps through several re-localizations, in fp32."""
    model, config = shape.model(), LoSiAConfig(**_CONFIG)
    tokens = shape.tokens()
    step = (
        _on_deepspeed(model, config, int(engine_name[-1]))
        if engine_name.startswith("zero")
        else _plain(model, config, engine_name)
    )
    return [step(tokens).item() for _ in range(_STEPS)]


def _plain(model: Any, config: LoSiAConfig, engine_name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    get_losia_model(model, config)
    if engine_name == "ddp":
        model = DistributedDataParallel(model, **compat.DDP_KEEPS_BUFFERS)
    elif engine_name == "fsdp2":
        mesh = init_device_mesh(next(model.parameters()).device.type, (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=_RATE), lr=_RATE)
    losia = LoSiA(model, optimizer, config)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losia.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _on_deepspeed(model: Any, config: LoSiAConfig, stage: int) -> Callable[[torch.Tensor], torch.Tensor]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "gradient_clipping": 0.0}  # its default is 1
    engine, *_ = initialize(model=model, losia_config=config, config=settings, lr=_RATE)  # LoSiAAdamW: nothing to compile

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def _collectives_agree(device: str) -> bool:
    """Every collective of localization in the dtypes it uses; over one rank each must give back what it was given."""
    group = dist.new_group([0])
    rows = torch.randn(8, 5, device=device, dtype=torch.bfloat16 if device != "cpu" else torch.float32)
    received = torch.empty_like(rows)
    compat.reduce_scatter_flat(received, rows, group=group, async_op=True).wait()
    sums = torch.randn(8, device=device, dtype=torch.float64)
    gathered, summed, largest, sent = torch.empty_like(sums), sums.clone(), sums.clone(), sums.clone()
    compat.all_gather_flat(gathered, sums, group=group)
    dist.all_reduce(summed, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    dist.broadcast(sent, group=group, group_src=0)
    return torch.equal(received, rows) and all(torch.equal(result, sums) for result in (gathered, summed, largest, sent))


if __name__ == "__main__":
    main()
