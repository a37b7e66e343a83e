"""The table and the bars of `benchmarks.whole_life`, from its stored results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common import bar, bar_table, table

LIMIT = 22.0  # GB, of all processes together
_RUNS = ("killed run", "resumed run", "training")


def report(parts: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Markdown. parts: figures by part and stage, as far as they were measured. names: of the parts, in words."""
    columns = [
        "",
        "planned, GB",
        "peak, GB",
        "with mapped files, GB",
        "first step after",
        "resumed after",
        "a step",
        "export's peak, GB",
        "bits",
    ]
    rows = []
    for part, stages in parts.items():
        killed, resumed = stages.get("killed run", stages.get("training", {})), stages.get("resumed run", {})
        row = [names.get(part, "LoRA by PEFT, r = 16"), _planned(stages), peak(stages), peak(stages, "resident_gb")]
        row += [_seconds(run.get("startup_seconds")) for run in (killed, resumed)]
        row += [_seconds(killed.get("step_seconds"))]
        exports = [stages[stage]["peak_gb"] for stage in ("delta", "export", "apply") if stage in stages]
        rows.append([*row, max(exports, default="-"), _bits(stages)])
    failures = [f"{part} failed: {stages['failed']['why']}" for part, stages in parts.items() if "failed" in stages]
    bars = [bar(f"{part}: peak, GB", max(_peaks(stages)), LIMIT) for part, stages in parts.items() if _peaks(stages)]
    return "\n\n".join([table(columns, rows), bar_table(bars), *failures])


def peak(stages: Mapping[str, Any], kind: str = "peak_gb") -> str:
    """Of the training, the most of the runs; "-" where none was measured."""
    found = _peaks(stages, kind)
    return f"{max(found):.2f}" if found else "-"


def _peaks(stages: Mapping[str, Any], kind: str = "peak_gb") -> list[float]:
    return [stages[run][kind] for run in _RUNS if kind in stages.get(run, {})]


def _planned(stages: Mapping[str, Any]) -> str:
    plan = stages.get("plan")
    return "-" if plan is None else f"{plan['planned_peak_bytes_per_gpu'] * plan['ranks'] / 1e9:.2f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s" if value >= 10 else f"{value:.2f} s"


def _bits(stages: Mapping[str, Any]) -> str:
    """What was compared bit for bit, and came out equal; or not."""
    found = {
        name: stages[stage]["equal_bits"] for name, stage in (("resumed", "resumed"), ("rebuilt", "rebuilt")) if stage in stages
    }
    return ", ".join(f"{name} {'equal' if equal else 'DIFFER'}" for name, equal in found.items()) or "-"
