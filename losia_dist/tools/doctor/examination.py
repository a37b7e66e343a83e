"""One examination, from a process alone or from all ranks of a launch."""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.errors import ConfigError
from losia_dist.ranks.agreement import Agreement
from losia_dist.tools.doctor import across_ranks, links, storage
from losia_dist.tools.doctor.findings import ERROR, Finding, Placed, error, merge, ok, render, to_json
from losia_dist.tools.doctor.machine import examine
from losia_dist.tools.doctor.machine_facts import Facts, collect
from losia_dist.tools.doctor.rendezvous import LaunchedProcess, RendezvousFailed, connect, launched_process, rendezvous, until

# The configuration files that may be named, and what reads them.
_READERS: dict[str, Callable[[str], Any]] = {
    "losia_config": LoSiAConfig.read,
    "deepspeed": lambda path: json.loads(Path(path).read_text(encoding="utf-8")),
}


def run(options: Namespace) -> int:
    """Examine, and print: the first rank for all, every rank for itself where they do not meet. Called by all ranks.

    Args:
        options: of `losia-dist doctor`: what is examined, and how long ranks wait for each other.

    Returns:
        0: nothing that would keep a run from working (warnings may be printed); 1: an error was found. The same on all
        ranks, unless they do not meet.
    """
    facts = collect()
    try:
        process = launched_process()
    except RendezvousFailed as problem:
        _show(options, merge([[problem.finding]]), 1, {})
        return 1
    own = examine(facts, process.local_rank, process.local_world_size, options.deepspeed is not None)
    own += check_files(options)
    if options.output_dir:
        own += storage.check_storage(options.output_dir, options.model)
    if process.world_size == 1:
        placed, measured = merge([own]), dict[str, Any]()
    else:
        try:
            connect(process, rendezvous(process, options.seconds), options.seconds)
        except RendezvousFailed as problem:
            # Nobody speaks for all: the first rank says what it found, every other one what keeps it from the others.
            if process.rank == 0:
                _show(options, merge([[*own, problem.finding]]), 1, {}, on=f"rank 0 of {process.world_size}, alone")
            else:
                print(render(merge([[problem.finding]]), 1)[0], file=sys.stderr, flush=True)
            return 1
        placed, measured = _together(options, process, facts, own)
    if process.rank == 0:
        _show(options, placed, process.world_size, measured)
    if process.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 1 if any(finding.level == ERROR for finding, _ in placed) else 0


def check_files(options: Namespace) -> list[Finding]:
    """The configuration files that were named: there, and readable as what they are."""
    findings = []
    for name, read in _READERS.items():
        path = getattr(options, name)
        if path is None:
            continue
        try:
            read(path)
            findings.append(ok("files", f"--{name} {path} can be read"))
        except (ConfigError, OSError, ValueError) as problem:
            findings.append(error("files", f"--{name} {path}: {problem}", "correct the file, or its path on this host"))
    return findings


def _together(
    options: Namespace, process: LaunchedProcess, facts: Facts, own: list[Finding]
) -> tuple[list[Placed], dict[str, Any]]:
    """All ranks' findings, those about differences, and the links; the same on all ranks."""
    with until(4 * options.seconds, f"{process}: comparing the ranks did not end"):
        ranks = Agreement(dist.group.WORLD, is_own=True)
        answers = ranks.gather((facts, _hashes(options)))
        local_ranks = ranks.gather(process.local_rank)
        common = across_ranks.compare(answers, local_ranks)
        if options.output_dir:
            common += _check_shared(options.output_dir, ranks)
        measured = {"gloo": links.measure(torch.device("cpu"), dist.group.WORLD)}
        everyone = [answer[0] for answer in answers]
        places = [(one.host, local) for one, local in zip(everyone, local_ranks, strict=True) if local < len(one.gpus)]
        if len(set(places)) == process.world_size and "nccl" in facts.backends:  # each rank has a GPU of its own
            device = torch.device("cuda", process.local_rank)
            torch.cuda.set_device(device)
            group = dist.new_group(backend="nccl", timeout=timedelta(seconds=options.seconds), device_id=device)
            measured["nccl"] = links.measure(device, group)
        hosts = len({one.host for one in everyone})
        common += [links.about(backend, values, hosts) for backend, values in measured.items()]
        return merge([[*findings, *common] for findings in ranks.gather(own)]), measured


def _check_shared(output_dir: str, ranks: Agreement) -> list[Finding]:
    """Whether all ranks see what the first one writes."""
    mark = storage.leave_mark(output_dir, secrets.token_hex(8)) if ranks.rank == 0 else None
    shown = ranks.gather(mark)[0]
    if shown is None:
        return []  # the first rank has said why
    seen = ranks.gather(storage.sees_mark(shown))
    if mark is not None:
        mark.unlink(missing_ok=True)
    return storage.check_shared(output_dir, seen)


def _hashes(options: Namespace) -> dict[str, str]:
    paths = {f"--{name}": Path(getattr(options, name) or "") for name in _READERS}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths.items() if path.is_file()}


def _show(options: Namespace, placed: list[Placed], world_size: int, measured: dict[str, Any], on: str = "") -> None:
    if options.json:
        print(json.dumps(to_json(placed, world_size, measured), indent=2), flush=True)
    else:
        print("\n".join(render(placed, world_size, on)), flush=True)
