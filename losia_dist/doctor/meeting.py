"""How the ranks find each other, with a limit of seconds and the names of those that did not come."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from losia_dist.doctor.findings import Finding, error, who
from losia_dist.watch import tell

_PIECE = 0.2  # seconds between looks at who has come
_GRACE = 5.0  # seconds beyond the limit: for the first rank's word, and for the others to read it


@dataclass(frozen=True)
class LaunchedProcess:
    """This process among the ranks, by the launcher's environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


class RendezvousFailed(Exception):
    """The ranks did not all come, or cannot reach each other; carries the finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def launched_process(environment: Mapping[str, str] = os.environ) -> LaunchedProcess:
    """From the environment that a launcher sets; one process alone without it.

    Raises:
        RendezvousFailed: a launcher started several processes and did not tell them their ranks, or where to meet.
    """
    if "RANK" not in environment and "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise RendezvousFailed(
            error(
                "launch",
                f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks that know no RANK: each would check by itself.",
                "set RANK, LOCAL_RANK and WORLD_SIZE from SLURM's variables, as launch/slurm/train.sbatch does",
            )
        )
    try:
        world_size = int(environment.get("WORLD_SIZE", 1))
        local = int(environment.get("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS_PER_NODE", 0)) or 0)
        process = LaunchedProcess(
            int(environment.get("RANK", 0)), world_size, int(environment.get("LOCAL_RANK", 0)), local or 1
        )
    except ValueError as problem:
        raise RendezvousFailed(
            error("launch", f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {problem}.", "unset them")
        ) from problem
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world_size > 1 and not environment.get(name)]
    if absent:
        fix = "start it with torchrun, deepspeed, accelerate launch, or as launch/slurm/train.sbatch does"
        raise RendezvousFailed(error("launch", f"WORLD_SIZE={world_size} without {' and '.join(absent)}.", fix))
    return process


def rendezvous(process: LaunchedProcess, host: str, seconds: float, environment: Mapping[str, str] = os.environ) -> Any:
    """A store of all ranks. Called by all ranks; ends within about `seconds`.

    Raises:
        RendezvousFailed: the first rank is not reached, or some ranks did not come in time; they are named.
    """
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    serves = process.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE", "False") != "True"  # torchrun does it itself
    try:
        if not serves:
            _reach(address, port, seconds)
        server: Any = dist.TCPStore(
            address, port, process.world_size, serves, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except (dist.DistError, RuntimeError, OSError) as problem:
        what = "serve" if serves else "reach"
        text = f"rank {process.rank} (host {host}) cannot {what} {address}:{port} within {seconds:g} s: {_first_line(problem)}."
        fix = "check that rank 0 runs on that host, the name's address there, and the firewall between the hosts"
        raise RendezvousFailed(error("meeting", text, fix)) from problem
    restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"losia_doctor/{restart}", server)
    with until(2 * seconds + 3 * _GRACE, f"rank {process.rank} (host {host}): the store at {address}:{port} did not answer"):
        try:
            missing = _roll_call(store, process, host, seconds)
            if not missing:
                return store
            finding = _about(missing, process, store, seconds)
            _part(store, process, "here", [rank for rank in range(process.world_size) if rank not in missing])
        except (dist.DistError, RuntimeError) as problem:
            raise RendezvousFailed(_store_ended(process, host, problem)) from problem
    raise RendezvousFailed(finding)


def connect(process: LaunchedProcess, host: str, store: Any, seconds: float) -> None:
    """Start gloo among all ranks: every pair connects, at ports of their own. Called by all ranks.

    Raises:
        RendezvousFailed: names the ranks that failed.
    """
    limit = timedelta(seconds=seconds)
    problem = ""
    with until(2 * seconds + _GRACE, f"rank {process.rank} (host {host}): connecting to the other ranks did not end"):
        try:
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("gloo", store), rank=process.rank, world_size=process.world_size, timeout=limit
            )
            dist.barrier()
        except (dist.DistError, RuntimeError, ValueError) as failure:
            problem = _first_line(failure)
        try:
            store.set(f"gloo/{process.rank}", f"{host}: {problem}" if problem else "")
            failed = _failures(store, process, seconds)
            _part(store, process, "gloo", list(range(process.world_size)))
        except (dist.DistError, RuntimeError) as lost:
            raise RendezvousFailed(_store_ended(process, host, lost)) from lost
    if failed:
        shown = "; ".join(failed[:3]) + (f"; and {len(failed) - 3} more" if len(failed) > 3 else "")
        text = f"the ranks meet, but do not reach each other at other ports within {seconds:g} s ({shown})."
        fix = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface between the hosts; open all ports among them"
        raise RendezvousFailed(error("meeting", text, fix))


@contextmanager
def until(seconds: float, text: str) -> Iterator[None]:
    """End this process, with an error line and code 1, where the block does not end in time: some calls have no limit."""

    def end() -> None:
        tell(f"error: {text} within {seconds:g} s.")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _roll_call(store: Any, process: LaunchedProcess, host: str, seconds: float) -> list[int]:
    """Ranks that did not come. The first rank counts, and all hear it from it: their clocks began at different moments."""
    store.set(f"here/{process.rank}", host)
    missing = list(range(process.world_size))
    if process.rank == 0:
        deadline = time.monotonic() + seconds
        while (missing := [rank for rank in missing if not store.check([f"here/{rank}"])]) and time.monotonic() < deadline:
            time.sleep(_PIECE)
        store.set("missing", json.dumps(missing))
        return missing
    deadline = time.monotonic() + seconds + _GRACE
    while not store.check(["missing"]):
        if time.monotonic() > deadline:
            return [0]
        time.sleep(_PIECE)
    return json.loads(store.get("missing"))


def _failures(store: Any, process: LaunchedProcess, seconds: float) -> list[str]:
    """Ranks that could not connect to the others, with their reasons."""
    failed = []
    deadline = time.monotonic() + seconds
    for rank in range(process.world_size):
        while not store.check([f"gloo/{rank}"]) and time.monotonic() < deadline:
            time.sleep(_PIECE)
        if not store.check([f"gloo/{rank}"]):
            failed.append(f"rank {rank} gave no answer")
        elif said := store.get(f"gloo/{rank}").decode():
            failed.append(f"rank {rank} on {said}")
    return failed


def _part(store: Any, process: LaunchedProcess, stage: str, ranks: list[int]) -> None:
    """The first rank serves the store: it stays until the others have read what they need, for a moment."""
    store.set(f"{stage}/read/{process.rank}", "")
    deadline = time.monotonic() + _GRACE
    while process.rank == 0 and time.monotonic() < deadline:
        if all(store.check([f"{stage}/read/{rank}"]) for rank in ranks):
            return
        time.sleep(_PIECE)


def _store_ended(process: LaunchedProcess, host: str, problem: Exception) -> Finding:
    text = f"rank {process.rank} (host {host}) lost its connection to rank 0's store: {_first_line(problem)}."
    return error("meeting", text, "see what rank 0 says; if it says nothing, the network between the hosts was cut")


def _reach(address: str, port: int, seconds: float) -> None:
    """Try until something answers there. The store would try as well, but its errors are pages of C++ frames."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() + _PIECE > deadline:
                raise
            time.sleep(_PIECE)


def _about(missing: list[int], process: LaunchedProcess, store: Any, seconds: float) -> Finding:
    present = [rank for rank in range(process.world_size) if rank not in missing]
    hosts = sorted({store.get(f"here/{rank}").decode() for rank in present})
    text = (
        f"{who(missing)} of {process.world_size} did not come within {seconds:g} s; "
        f"{who(present)} did (hosts {', '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''})."
    )
    fix = "on the hosts that are not listed: does the launcher run there, with this MASTER_ADDR, and does a firewall stop it?"
    return error("meeting", text, fix)


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200].rstrip(".")
