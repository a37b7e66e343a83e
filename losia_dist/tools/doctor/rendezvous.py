"""How the ranks find each other, with a limit of seconds and the names of those that did not come."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from losia_dist.ranks.watch.watch import tell
from losia_dist.tools.doctor.findings import error, who

_PIECE = 0.2  # seconds between attempts to reach the first rank
_GRACE = 5.0  # seconds beyond the limit: for the first rank's word, and for the others to read it


@dataclass(frozen=True)
class LaunchedProcess:
    """This process among the ranks, by the launcher's environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str = field(default_factory=socket.gethostname)

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host})"


class RendezvousFailed(Exception):
    """The ranks did not all come, or cannot reach each other; carries the finding."""

    def __init__(self, subject: str, text: str, fix: str) -> None:
        super().__init__(text)
        self.finding = error(subject, text, fix)


def launched_process(environment: Mapping[str, str] = os.environ) -> LaunchedProcess:
    """From the environment that a launcher sets; one process alone without it.

    Raises:
        RendezvousFailed: a launcher started several processes and did not tell them their ranks, or where to meet.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in environment and "SLURM_STEP_ID" in environment and int(tasks) > 1:
        fix = "set RANK, LOCAL_RANK and WORLD_SIZE from SLURM's variables, as launch/slurm/train.sbatch does"
        raise RendezvousFailed("launch", f"srun started {tasks} tasks that know no RANK: each would check by itself.", fix)
    try:
        rank, world_size, local_rank = (
            int(environment.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        local = int(environment.get("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS_PER_NODE", 0)) or 0)
    except ValueError as problem:
        text = f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {problem}."
        raise RendezvousFailed("launch", text, "unset them") from problem
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world_size > 1 and not environment.get(name)]
    if absent:
        fix = "start it with torchrun, deepspeed, accelerate launch, or as launch/slurm/train.sbatch does"
        raise RendezvousFailed("launch", f"WORLD_SIZE={world_size} without {' and '.join(absent)}.", fix)
    return LaunchedProcess(rank, world_size, local_rank, local or 1)


def rendezvous(process: LaunchedProcess, seconds: float, environment: Mapping[str, str] = os.environ) -> Any:
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
        text = f"{process} cannot {what} {address}:{port} within {seconds:g} s: {_first_line(problem)}."
        fix = "check that rank 0 runs on that host, the name's address there, and the firewall between the hosts"
        raise RendezvousFailed("meeting", text, fix) from problem
    store = dist.PrefixStore(f"losia_doctor/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    with _asking(process, 2 * seconds + 3 * _GRACE, f"the store at {address}:{port} did not answer"):
        missing = _roll_call(store, process, seconds)
        if not missing:
            return store
        present = [rank for rank in range(process.world_size) if rank not in missing]
        hosts = sorted({store.get(f"here/{rank}").decode() for rank in present})
        # The first rank serves the store: it stays until the others have read what they need, for a moment.
        store.set(f"read/{process.rank}", "")
        if process.rank == 0:
            _wait(store, [f"read/{rank}" for rank in present], _GRACE)
    text = (
        f"{who(missing)} of {process.world_size} did not come within {seconds:g} s; "
        f"{who(present)} did (hosts {', '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''})."
    )
    fix = "on the hosts that are not listed: does the launcher run there, with this MASTER_ADDR, and does a firewall stop it?"
    raise RendezvousFailed("meeting", text, fix)


def connect(process: LaunchedProcess, store: Any, seconds: float) -> None:
    """Start gloo among all ranks: every pair connects, at ports of their own. Called by all ranks.

    Raises:
        RendezvousFailed: this rank does not reach another.
    """
    place: dict[str, Any] = {"rank": process.rank, "world_size": process.world_size, "timeout": timedelta(seconds=seconds)}
    with until(2 * seconds + _GRACE, f"{process}: connecting to the other ranks did not end"):
        try:
            dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), **place)
            dist.barrier()
        except (dist.DistError, RuntimeError, ValueError) as problem:
            if process.rank == 0:
                time.sleep(_GRACE)  # it serves the store, whose end would be what the others see
            text = f"the ranks meet, but {process} does not reach all others at other ports: {_first_line(problem)}."
            fix = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface between the hosts; open all ports among them"
            raise RendezvousFailed("meeting", text, fix) from problem


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


@contextmanager
def _asking(process: LaunchedProcess, seconds: float, text: str) -> Iterator[None]:
    """A block that asks the first rank's store: it ends in time, and a store that went away is a finding."""
    with until(seconds, f"{process}: {text}"):
        try:
            yield
        except (dist.DistError, RuntimeError) as problem:
            text = f"{process} lost its connection to rank 0's store: {_first_line(problem)}."
            fix = "see what rank 0 says; if it says nothing, the network between the hosts was cut"
            raise RendezvousFailed("meeting", text, fix) from problem


def _roll_call(store: Any, process: LaunchedProcess, seconds: float) -> list[int]:
    """Ranks that did not come. The first rank counts, and all hear it from it: their clocks began at different moments."""
    store.set(f"here/{process.rank}", process.host)
    if process.rank != 0:
        return json.loads(store.get("missing")) if _wait(store, ["missing"], seconds + _GRACE) else [0]
    ranks = range(process.world_size)
    _wait(store, [f"here/{rank}" for rank in ranks], seconds)
    missing = [rank for rank in ranks if not store.check([f"here/{rank}"])]
    store.set("missing", json.dumps(missing))
    return missing


def _wait(store: Any, keys: list[str], seconds: float) -> bool:
    """Whether all of these are set in time."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return False
    return True


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


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200].rstrip(".")
