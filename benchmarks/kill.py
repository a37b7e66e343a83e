"""Kill -9 a run of two ranks at random moments, resume it, and compare the end with a run that was never disturbed.

    python -m benchmarks.kill --moments 50 [--engine ddp|zero2|zero3|fsdp2] [--seed 0]

Every step of two micro-batches is saved and followed by an evaluation, and subnets move every third one; the run writes down
which phase it is in, and the table says where each kill fell. Moments are drawn by turns from the whole of training, a save, a
re-localization, the time between two micro-batches, and an evaluation. Each is a run of its own: started, killed (one rank or
all, by turns), resumed from whatever is complete, and trained to the end. Exit code 1 if any run differs.

    python -m benchmarks.kill --starts 20 [--seed 0] [--extensions FOLDER]

kills starts under DeepSpeed in their first half minute instead, and looks whether the next start trains (kill_starts.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, load_checkpoint, losia_parameter_groups, save_checkpoint
from losia_dist.checkpoint import layout
from losia_dist.checkpoint.session import wait_for_saving
from losia_dist.checkpoint.tensor_names import unwrap

STEPS, PERIOD, RANKS = 24, 3, 2
AIMS = ("any", "save", "re-localization", "accumulation", "evaluation")
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--engine", choices=["ddp", "zero2", "zero3", "fsdp2"], default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, help="kill this many starts under DeepSpeed")
    parser.add_argument("--extensions", type=Path, help="with --starts: a folder where torch's extensions are built already")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.engine, options.worker)
        return 0
    if options.starts:
        from benchmarks import kill_starts

        return kill_starts.report(options.starts, options.seed, options.extensions)
    with tempfile.TemporaryDirectory() as directory:
        return report(options, Path(directory))


def report(options: argparse.Namespace, directory: Path) -> int:
    """Run all moments and print a line for each."""
    chance = random.Random(options.seed)
    run(options.engine, directory / "undisturbed")
    training = float((directory / "undisturbed" / "seconds").read_text())
    expected = torch.load(directory / "undisturbed" / "end.pt", weights_only=True)
    print(
        f"{options.engine}, {RANKS} ranks, {STEPS} steps in {training:.1f} s; every step is saved, subnets move every {PERIOD}"
    )
    print(f"{'moment':>6} {'killed':>7} {'in':>16} {'at step':>8} {'resumed from':>13} {'end equals':>11}")
    different, where = 0, Counter()
    for moment in range(options.moments):
        place = directory / f"moment-{moment}"
        victims = list(range(RANKS)) if moment % 2 else [chance.randrange(RANKS)]
        aim = AIMS[moment % len(AIMS)]
        phase, step = killed_run(options.engine, place, victims, chance, aim, training)
        complete = layout.complete_checkpoints(place / "saved")
        resumed = complete[-1].path.name if complete else "the start"
        run(options.engine, place)
        end = torch.load(place / "end.pt", weights_only=True)
        equal = end.keys() == expected.keys() and all(torch.equal(end[name], tensor) for name, tensor in expected.items())
        different += not equal
        where[phase] += 1
        who = "all" if len(victims) > 1 else f"rank {victims[0]}"
        print(f"{moment:>6} {who:>7} {phase:>16} {step:>8} {resumed:>13} {'yes' if equal else 'NO':>11}", flush=True)
        shutil.rmtree(place)
    same = options.moments - different
    print(f"{same} of {options.moments} runs ended with the undisturbed run's weights and optimizer state, bit for bit")
    print("kills fell into: " + ", ".join(f"{phase} {count}" for phase, count in where.most_common()))
    return 1 if different else 0


def start(engine: str, directory: Path) -> list[subprocess.Popen[bytes]]:
    from benchmarks.ranks import free_port  # not at the top: a worker is started by its file

    port = free_port()
    directory.mkdir(exist_ok=True)
    processes = []
    for rank in range(RANKS):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, __file__, "--engine", engine, "--worker", str(directory)]
        log = open(directory / f"log-{rank}", "ab")  # noqa: SIM115 (the process keeps it)
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        log.close()
    return processes


def run(engine: str, directory: Path) -> None:
    """Start, or resume, and train to the end."""
    codes = [process.wait() for process in start(engine, directory)]
    if any(codes):
        raise SystemExit(f"a run ended with {codes}:\n{(directory / 'log-0').read_text()[-3000:]}")


def killed_run(
    engine: str, directory: Path, victims: list[int], chance: random.Random, aim: str, training: float
) -> tuple[str, str]:
    """Start, kill at a random moment after the first step began, and clear away; the phase and step it fell into."""
    processes = start(engine, directory)
    marks = directory / "phase-0"
    wanted, step = ("step", 0) if aim == "any" else (aim, chance.randrange(STEPS - PERIOD))
    while all(process.poll() is None for process in processes):
        phase, reached = read_mark(marks)
        if phase == wanted and reached >= step:
            break
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, training if aim == "any" else 0.03 if aim == "save" else 0.003))
    for rank in victims:
        processes[rank].send_signal(signal.SIGKILL)
    phase, reached = read_mark(marks)
    # What a launcher does once one rank is gone: the others would wait for it.
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    return phase, str(reached)


def read_mark(marks: Path) -> tuple[str, int]:
    """The phase that rank 0 is in, and its step."""
    if not marks.exists():
        return "start", 0
    phase, step = marks.read_text().split()
    return phase, int(step)


def work(engine: str, directory: Path) -> None:
    """One rank's run: resume if anything is complete, save after every step, leave the end behind."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    arguments, step_once = build(engine)
    losia = arguments["losia"]
    saved = directory / "saved"
    found = [bool(layout.complete_checkpoints(saved))]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        load_checkpoint(saved, **arguments)

    def mark(phase: str) -> None:
        beside = directory / f"phase-{rank}.new"
        beside.write_text(f"{phase} {losia.steps}")
        beside.replace(directory / f"phase-{rank}")

    losia.on_relocalize.append(lambda group: mark("re-localization"))
    began = time.monotonic()
    while losia.steps < STEPS:
        mark("step")
        generator = torch.Generator().manual_seed(losia.steps * RANKS + rank)
        tokens = torch.randint(0, SHAPE["vocab_size"], (2, 2, 16), generator=generator)
        step_once([{"input_ids": ids, "labels": ids} for ids in tokens], mark)
        mark("save")
        save_checkpoint(saved, **arguments, keep_last=3, asynchronous=losia.steps % 4 == 0)
        mark("evaluation")
        evaluate(arguments["model"])
    (directory / "seconds").write_text(str(time.monotonic() - began))
    losia.consolidate()
    end = {name: losia.parameters.read_whole(p).clone() for name, p in unwrap(losia.model).named_parameters()}
    for layer in losia.sites:
        end |= {f"{layer.name} {key}": t.clone() for key, t in losia.state.read_state(layer.subnet).items()}
    if rank == 0:
        torch.save(end, directory / "end.pt")
    wait_for_saving(losia)
    dist.barrier()
    dist.destroy_process_group()


def evaluate(model: Any) -> None:
    """A loss without gradients, in between."""
    tokens = torch.arange(32).reshape(2, 16)
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens, labels=tokens, use_cache=False)
    model.train()


def build(engine: str) -> tuple[dict[str, Any], Callable[[list[dict[str, torch.Tensor]], Callable[[str], None]], None]]:
    """What save_checkpoint is given, and a function that trains one step over its micro-batches."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, max_position_embeddings=32)).train()
    config = LoSiAConfig(rank_factor=0.25, period=PERIOD)
    if engine.startswith("zero"):
        from losia_dist import initialize

        settings = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
        settings |= {"zero_optimization": {"stage": int(engine[4])}}
        ds_engine, optimizer, _, _ = initialize(model=model, losia_config=config, config=settings, lr=1e-3)

        def ds_step(micro_batches: list[dict[str, torch.Tensor]], mark: Callable[[str], None]) -> None:
            for batch in micro_batches:
                ds_engine.backward(ds_engine(**batch, use_cache=False).loss)
                ds_engine.step()
                mark("accumulation")

        return {"model": ds_engine, "optimizer": optimizer, "losia": ds_engine.losia}, ds_step
    get_losia_model(model, config)
    wrapped: Any
    if engine == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = LoSiAAdamW(losia_parameter_groups(wrapped, lr=1e-3), lr=1e-3)
    losia = LoSiA(wrapped, optimizer, config)

    def step(micro_batches: list[dict[str, torch.Tensor]], mark: Callable[[str], None]) -> None:
        for batch in micro_batches:
            (wrapped(**batch, use_cache=False).loss / len(micro_batches)).backward()
            mark("accumulation")
        optimizer.step()
        losia.step()
        optimizer.zero_grad()

    return {"model": wrapped, "optimizer": optimizer, "losia": losia}, step


if __name__ == "__main__":
    sys.exit(main())
