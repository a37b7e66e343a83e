"""What an earlier version took and this one does not: refused by name, with what to use now. CHANGELOG.md has the figures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from losia_dist.errors import ConfigError


class _Setting(NamedTuple):
    """A value that a setting of `LoSiAConfig` had; why it went, what to do; what is left, where the whole setting went."""

    removed: str
    why: str
    instead: str
    left: str | None = None


_SETTINGS = {
    "selection": _Setting(
        "alternating",
        "it ended at a loss of 0.8027 where 'greedy' ended at 0.8025, for six more passes over the calibration batches "
        "(docs/quality.md)",
        "Set selection='greedy'.",
    ),
    "moments": _Setting(
        "kept",
        "drawn subnets ended at a loss of 0.7946 with it, each at its best rate, and at 0.7867 without; located ones at 0.8088 "
        "and 0.8025 (docs/quality.md)",
        "Leave moments out: they are cleared when a subnet moves.",
        left="cleared",
    ),
    "importance_accumulation": _Setting(
        "micro_batch",
        "it was not exact, did not work where a gradient comes in parts, and spared 0.9 of 54.7 GB a GPU (Llama-2-70B on four "
        "GPUs, by losia-dist plan; CHANGELOG.md)",
        "Leave importance_accumulation out: importance comes from the gradient of the whole step.",
        left="step",
    ),
}
# Environment variable -> the value that asks for what is left, and what was removed.
_VARIABLES = {
    "LOSIA_KERNELS": (
        "none",
        "the Triton kernels were removed, since no GPU ever measured a gain (CHANGELOG.md); plain torch does their work",
    ),
}


def removed_setting(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which of these settings has a value that was removed, and why; and what to do instead. None where there is none."""
    for name, setting in _SETTINGS.items():
        if values.get(name) == setting.removed:
            return f"{name}={setting.removed!r} was removed: {setting.why}.", setting.instead
    return None


def refuse_removed_settings(values: Mapping[str, Any], source: str | None = None) -> None:
    """Raises: ConfigError where one of these settings asks for what was removed. source: where they come from."""
    found = removed_setting(values)
    if found:
        raise ConfigError(" ".join([*([f"{source}:"] if source else []), *found]))


def without_kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that went, where they ask for what is left."""
    left = {name: setting.left for name, setting in _SETTINGS.items() if setting.left is not None}
    return {name: value for name, value in values.items() if name not in left or value != left[name]}


def removed_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment says about what was removed, to be compared over the ranks."""
    return {name: environment.get(name, kept) for name, (kept, _) in _VARIABLES.items()}


def refuse_removed_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: ConfigError where an environment variable asks for what was removed."""
    for name, value in removed_variables(environment).items():
        kept, why = _VARIABLES[name]
        if value != kept:
            raise ConfigError(f"{name}={value}: {why}. Unset {name}.")
