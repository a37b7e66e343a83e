"""What the doctor says: one line a finding, with the fix, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

OK, WARNING, ERROR = "ok", "warning", "error"
_ORDER = (OK, WARNING, ERROR)


@dataclass(frozen=True)
class Finding:
    """level: "ok", "warning" (slow or risky) or "error" (a run would fail, or hang).

    subject: what was looked at, in a word or two. fix: what to do; empty where all is well.
    """

    level: str
    subject: str
    text: str
    fix: str = ""


ok = partial(Finding, OK)
warning = partial(Finding, WARNING)
error = partial(Finding, ERROR)


Placed = tuple[Finding, list[int]]  # a finding, and the ranks that made it


def merge(per_rank: list[list[Finding]]) -> list[Placed]:
    """Each finding once, in the order in which the ranks made them, the errors last, where a reader ends."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(per_rank):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    return sorted(ranks.items(), key=lambda placed: _ORDER.index(placed[0].level))


def render(placed: list[Placed], world_size: int, on: str = "") -> list[str]:
    """One line a finding, and a last one that counts them. on: whom it speaks for, if not for all ranks."""
    subjects = max((len(finding.subject) for finding, _ in placed), default=0)
    lines = []
    for finding, ranks in placed:
        where = f" [{who(ranks)}]" if len(ranks) < world_size else ""
        fix = f" Fix: {finding.fix}" if finding.fix else ""
        lines.append(f"{finding.level:<8} {finding.subject:<{subjects}}  {finding.text}{where}{fix}")
    counts = Counter(finding.level for finding, _ in placed)
    on = on or ("this machine" if world_size == 1 else f"{world_size} ranks")
    lines.append(f"{on}: errors {counts[ERROR]}, warnings {counts[WARNING]}, ok {counts[OK]}")
    return lines


def to_json(placed: list[Placed], world_size: int, measured: dict[str, Any]) -> dict[str, Any]:
    """The same as plain values. measured: what `losia_dist.tools.doctor.links` returns, by backend."""
    counts = Counter(finding.level for finding, _ in placed)
    findings = [{**asdict(finding), "ranks": ranks} for finding, ranks in placed]
    numbers = {"errors": counts[ERROR], "warnings": counts[WARNING], "ranks": world_size}
    return {**numbers, "links": measured, "findings": findings}


def who(ranks: list[int]) -> str:
    """ "rank 2", or "ranks 0-3, 7"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)}"


def spans(numbers: list[int]) -> str:
    """ "0-3, 7" of [0, 1, 2, 3, 7]."""
    parts: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
