"""What an earlier version took and this one does not: refused by name, with what to use now. CHANGELOG.md has the figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from losia_dist.errors import ConfigError

# A setting and the value of it that was removed -> why it went, and what to do.
_REMOVED = {
    ("selection", "alternating"): (
        "it ended at a loss of 0.8027 where 'greedy' ended at 0.8025, for six more passes over the calibration batches "
        "(docs/quality.md). Set selection='greedy'."
    ),
    ("moments", "kept"): (
        "drawn subnets ended at a loss of 0.7946 with it, each at its best rate, and at 0.7867 without; located ones at 0.8088 "
        "and 0.8025 (docs/quality.md). Leave moments out: they are cleared when a subnet moves."
    ),
    ("importance_accumulation", "micro_batch"): (
        "it was not exact, and spared 0.9 of 54.7 GB a GPU (CHANGELOG.md). Leave importance_accumulation out: importance comes "
        "from the gradient of the whole step."
    ),
}
_LEFT = {"moments": "cleared", "importance_accumulation": "step"}  # the values that ask for what there is anyway
# A setting that stood beside selection -> the class that has it now, and its name there.
_MOVED = {
    "importance": ("Located", "importance"),
    "importance_betas": ("Located", "betas"),
    "init": ("Located", "start"),
    "localization": ("Located", "reduction"),
    "calibration_batches": ("Located", "calibration_batches"),
    "outlier_limit": ("Drawn", "outlier_limit"),
}


def refuse_removed_settings(values: Mapping[str, Any], source: str = "LoSiAConfig") -> None:
    """Raises: ConfigError where one of these settings asks for what was removed or moved. source: where they come from."""
    for (name, removed), why in _REMOVED.items():
        if values.get(name) == removed:
            raise ConfigError(f"{source}: {name}={removed!r} was removed: {why}")
    for name in values:
        if name in _MOVED:
            kind, now = _MOVED[name]
            raise ConfigError(
                f"{source} has no {name} any more: give selection={kind}({now}=...), in a file selection: "
                f"{{{kind.lower()}: {{{now}: ...}}}}."
            )


def without_kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that went, where they ask for what is left."""
    return {name: value for name, value in values.items() if name not in _LEFT or value != _LEFT[name]}


def removed_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment says about what was removed, to be compared over the ranks."""
    return {"LOSIA_KERNELS": environment.get("LOSIA_KERNELS", "none")}


def refuse_removed_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: ConfigError where an environment variable asks for what was removed."""
    for name, value in removed_variables(environment).items():
        if value != "none":
            raise ConfigError(
                f"{name}={value}: the Triton kernels were removed, since no GPU ever measured a gain (CHANGELOG.md); plain "
                f"torch does their work. Unset {name}."
            )
