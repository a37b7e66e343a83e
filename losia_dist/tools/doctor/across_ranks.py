"""Judgement of all ranks together: what must be the same everywhere, and is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from losia_dist.tools.doctor.findings import Finding, error, ok, warning, who
from losia_dist.tools.doctor.machine_facts import Facts, compared

Answer = tuple[Facts, dict[str, str]]  # a rank's facts, and the hashes of the files it was given, by option


def compare(answers: list[Answer], local_ranks: list[int]) -> list[Finding]:
    """Findings about differences; pure. answers, local_ranks: in the order of the ranks."""
    facts = [answer[0] for answer in answers]
    findings = []
    rows = [
        ("code", "losia_dist's source", [{"": one.code} for one in facts], "install the same commit on all hosts"),
        ("versions", "the version of", [one.versions for one in facts], "install the same requirements, or use one image"),
        ("files", "the file of", [answer[1] for answer in answers], "copy one file to all hosts, or keep it on a shared disk"),
        ("settings", "the environment's", [compared(one.environment) for one in facts], "set it alike on all hosts"),
    ]
    for subject, what, values, fix in rows:
        differing = _differences(what, values, [one.host for one in facts])
        findings += [error(subject, text, fix) for text in differing]
        if not differing and any(values):
            findings.append(ok(subject, "the same on all ranks"))
    return findings + _check_gpus(facts, local_ranks)


def _differences(what: str, values: Sequence[Mapping[str, str]], hosts: list[str]) -> list[str]:
    """One sentence for each name whose value differs."""
    sentences = []
    for name in sorted({name for one in values for name in one}):
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, one in enumerate(values):
            groups[one.get(name, "nothing")].append(rank)
        if len(groups) > 1:
            shown = "; ".join(f"{value} on {_where(ranks, hosts)}" for value, ranks in list(groups.items())[:4])
            sentences.append(f"{what} {name}".rstrip() + f" differs: {shown}.")
    return sentences


def _where(ranks: list[int], hosts: list[str]) -> str:
    names = sorted({hosts[rank] for rank in ranks})
    return f"{who(ranks)} ({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"


def _check_gpus(facts: list[Facts], local_ranks: list[int]) -> list[Finding]:
    findings = []
    used: dict[tuple[str, str], list[int]] = defaultdict(list)
    kinds: dict[str, list[int]] = defaultdict(list)
    for rank, (one, local) in enumerate(zip(facts, local_ranks, strict=True)):
        gpu = one.gpus[local] if local < len(one.gpus) else None
        kinds[gpu.name if gpu else "no GPU"].append(rank)
        if gpu:
            used[one.host, gpu.uuid].append(rank)
    if len(kinds) > 1:
        shown = "; ".join(f"{name}: {who(ranks)}" for name, ranks in kinds.items())
        make = error if "no GPU" in kinds else warning
        findings.append(make("gpus", f"the ranks differ in their GPUs ({shown}): all wait for the slowest.", "use equal nodes"))
    fix = "LOCAL_RANK must number the ranks of a host from 0, one per GPU"
    shared = {place: ranks for place, ranks in used.items() if len(ranks) > 1}
    return findings + [error("gpus", f"{who(ranks)} use one GPU of {host}.", fix) for (host, _), ranks in shared.items()]
