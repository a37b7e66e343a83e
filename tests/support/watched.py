"""Runs of 2 or 3 ranks as real processes, to be killed, stopped or failed: `start` them, and look at how each one ended.

As a program (`python -m tests.support.watched ENGINE TROUBLE`) it is one rank of such a run.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 2.0  # seconds


@dataclass
class Ended:
    """How a rank ended."""

    code: int
    text: str  # stdout and stderr
    seconds: float  # from the trouble (or the start, where there is none) to its end


def run(world_size: int, engine: str, trouble: str, *, timeout: float = 60, **environment: str) -> list[Ended]:
    """Start the ranks, wait for them, and return how they ended, in rank order. The ranks know their trouble (`main`).

    environment: variables of every rank; the patience is `PATIENCE`, and "" means the default.

    Raises:
        AssertionError: some rank that was not stopped on purpose is still there after `timeout` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LOSIA_")},
        **environment,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    environment.setdefault("LOSIA_LIVENESS_PATIENCE", str(PATIENCE))
    command = [sys.executable, "-m", "tests.support.watched", engine, trouble]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    began = time.monotonic()
    ended: dict[int, float] = {}
    try:
        while len(ended) < world_size and time.monotonic() - began < timeout:
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.time()
            if "stop" in trouble and len(ended) == world_size - 1:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    texts = [process.communicate()[0] for process in processes]
    stopped = int(trouble.rpartition("-")[2]) if "stop" in trouble else None
    assert all(rank in ended for rank in range(world_size) if rank != stopped), "\n".join(texts)
    moments = [float(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("TROUBLE ")]
    moment = min(moments, default=time.time() - (time.monotonic() - began))
    return [
        Ended(process.returncode, text, ended.get(rank, moment) - moment)
        for rank, (process, text) in enumerate(zip(processes, texts, strict=True))
    ]


def main(engine: str, trouble: str) -> None:
    """Train six steps; before step 4 the trouble, "kind-rank", comes over that rank."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, initialize, losia_parameter_groups

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    kind, _, place = trouble.rpartition("-")
    mine = trouble != "none" and int(place) == rank
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    config = LoSiAConfig(rank_factor=0.5, period=2)
    if engine == "ddp":
        get_losia_model(model, config)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = LoSiAAdamW(losia_parameter_groups(wrapped, lr=1e-3), lr=1e-3)
        losia = LoSiA(wrapped, optimizer, config, watch=True)
    else:
        stage = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": int(engine[-1])}}
        wrapped, optimizer, _, _ = initialize(model=model, losia_config=config, config=stage, lr=1e-3)
        losia = wrapped.losia
    steps = 3 if mine and kind in ("early", "detached") else 6
    for step in range(steps):
        if mine and step == 3:
            _trouble(kind)
        loss = wrapped(torch.randn(4, 12)).square().mean()
        if engine == "ddp":
            loss.backward()
            optimizer.step()
            losia.step()
            optimizer.zero_grad()
        else:
            wrapped.backward(loss)
            wrapped.step()
    if mine and kind in ("early", "detached"):
        _mark()
        if kind == "detached":
            losia.detach()
            time.sleep(2 * PATIENCE + 6)
        return
    if kind == "patient":  # all are through; one has more to do, alone, for longer than the patience
        if mine:
            time.sleep(2.5 * PATIENCE)
            print("SOLO WORK DONE", flush=True)
        return
    dist.barrier()
    dist.destroy_process_group()
    print("TRAINED", flush=True)


def _mark() -> None:
    print(f"TROUBLE {time.time()}", flush=True)


def _trouble(kind: str) -> None:
    _mark()
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "raise":
        raise ValueError("a bad sample")
    elif kind in ("patient", "deadlock"):
        # The main thread alone waits: as in a debugger, in a long save, or for ever.
        time.sleep(30 if kind == "deadlock" else 2.5 * PATIENCE)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
