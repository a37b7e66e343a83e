"""A pool of gloo ranks that all tests reuse. They are forked from a server that has imported what ranks need: that is most of
what a multi-rank test costs."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import itertools
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

IMPORTED = "tests.support.imported"
GRACE_SECONDS = 5.0  # given to the other ranks once one has failed
THREADS = 60  # of a rank, beyond which its pool makes room for a new one


@dataclass(frozen=True)
class Failure:
    """How one rank failed: the exception's type name, message and traceback."""

    rank: int
    kind: str
    message: str
    trace: str


class RankError(AssertionError):
    """Some rank failed; `failures` holds each of them, and the text shows every traceback."""

    def __init__(self, failures: list[Failure]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {f.rank} failed: {f.kind}: {f.message}\n{f.trace}" for f in failures))


class RankPool:
    """`world_size` processes joined by gloo, each waiting for functions to run."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([IMPORTED])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            # Not a daemon: those may not start the worker processes of a data loader.
            process = context.Process(target=_serve, args=(theirs, rank, world_size, port), daemon=False)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        atexit.register(self.stop, gently=False)  # before multiprocessing's own hook, which would wait for them

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float) -> list[Any]:
        """Results in rank order.

        Raises:
            RankError: some rank raised, died or hung. If any did not answer, the pool is stopped.
        """
        request = pickle.dumps((function.__module__, function.__qualname__, args, kwargs))
        for pipe in self.pipes:
            pipe.send_bytes(request)
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            open_ranks = [r for r in range(self.world_size) if r not in results and r not in failures]
            ready = wait([self.pipes[r] for r in open_ranks], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in open_ranks:
                if self.pipes[rank] not in ready:
                    continue
                try:
                    ok, payload = pickle.loads(self.pipes[rank].recv_bytes())
                except EOFError:
                    self.processes[rank].join(5)
                    code = self.processes[rank].exitcode
                    ok, payload = False, Failure(rank, "Died", f"the process ended with exit code {code}", "")
                if ok:
                    results[rank] = payload
                else:
                    failures[rank] = payload
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        silent = [r for r in range(self.world_size) if r not in results and r not in failures]
        if silent or any(f.kind == "Died" for f in failures.values()):
            self.stop(gently=False)
        if silent and not failures:
            failures = {r: Failure(r, "Hung", f"no answer within {timeout:.0f} s", "") for r in silent}
        if failures:
            raise RankError([failures[rank] for rank in sorted(failures)])
        return [results[rank] for rank in range(self.world_size)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    @property
    def worn(self) -> bool:
        """Whether finished runs have left many threads, of groups that `_kept_by_libraries` spares or engines that
        DeepSpeed never frees."""
        return any(len(list(Path(f"/proc/{process.pid}/task").glob("*"))) > THREADS for process in self.processes)

    def stop(self, gently: bool = True) -> None:
        """End the processes; gently: after a barrier, so that gloo does not abort at exit."""
        atexit.unregister(self.stop)
        for pipe in self.pipes:
            if gently:
                with contextlib.suppress(OSError):
                    pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(10 if gently else 0)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.pipes:
            pipe.close()


class Ranks:
    """The `ranks` fixture: runs a test's function on a number of ranks, in pools kept until they are worn, one a number."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180, **kwargs: Any
    ) -> list[Any]:
        """Run a module-level function on every rank; results in rank order."""
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive or pool.worn:
            self._end(world_size)
            pool = self._pools[world_size] = RankPool(world_size)
        return pool.run(function, args, kwargs, timeout)

    def fresh(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """The same in processes that have run nothing else."""
        self._end(world_size)
        return self(world_size, function, *args, **kwargs)

    def errors(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """Run a function that must raise on every rank; (type name, message) in rank order."""
        try:
            self(world_size, function, *args, **kwargs)
        except RankError as error:
            by_rank = {failure.rank: (failure.kind, failure.message) for failure in error.failures}
            missing = [rank for rank in range(world_size) if rank not in by_rank]
            if missing:
                raise AssertionError(f"ranks {missing} did not raise; the others: {error}") from error
            return [by_rank[rank] for rank in range(world_size)]
        raise AssertionError("no rank raised")

    def close(self) -> None:
        for world_size in list(self._pools):
            self._end(world_size)

    def _end(self, world_size: int) -> None:
        pool = self._pools.pop(world_size, None)
        if pool is not None:
            pool.stop()


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    """A rank's life: join the group, run what is asked, leave together."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],  # ninja, for DeepSpeed's first build
    )
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(IMPORTED)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    store = dist.distributed_c10d._get_default_store()
    for number in itertools.count():
        try:
            request = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if request is None:
            dist.barrier()
            dist.destroy_process_group()
            return
        module, name, args, kwargs = request
        known = _process_groups()
        try:
            torch.manual_seed(0)
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except BaseException as error:
            failure = Failure(rank, type(error).__name__, str(error), traceback.format_exc())
            answer = pickle.dumps((False, failure))
            del error
        gc.collect()
        _forget_sequences()
        pipe.send_bytes(answer)
        _meet(store, number, world_size)
        for group in _process_groups() - known - _kept_by_libraries():
            dist.destroy_process_group(group)


def _meet(store: Any, number: int, world_size: int) -> None:
    """Wait until every rank is done with the request: a rank once ended with a corrupted heap, and groups that end on one rank
    while another may still read from them are the suspect. By the store, since after a failure no two ranks are in the same
    collective; a rank that does not come has its pool stopped."""
    key, deadline = f"done with request {number}", time.monotonic() + GRACE_SECONDS
    store.add(key, 1)
    while store.add(key, 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.002)


def _forget_sequences() -> None:
    """DeepSpeed's next engine would take over the groups of a run with sequence parallelism, which end with its request."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups.mpu = None  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    """A rank whose test run was killed may wait in a collective, or behind a lock, for those that come after it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _process_groups() -> set[Any]:
    """All that this rank belongs to. Each has threads that look for work a hundred times a second: those of hundreds of
    finished runs would take both cores of a small machine."""
    from torch.distributed.distributed_c10d import _world

    return set(_world.pg_map)


def _kept_by_libraries() -> set[Any]:
    """Process groups that are taken up again: DeepSpeed makes its own once, and DTensor keeps those of meshes."""
    groups = sys.modules.get("deepspeed.utils.groups")
    held = list(vars(groups).values()) if groups is not None else []
    held += [group for value in held if isinstance(value, dict) for group in value.values()]
    return {group for group in _process_groups() if group.group_desc.startswith("mesh_") or any(group is one for one in held)}
