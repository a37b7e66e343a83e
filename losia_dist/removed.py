"""What an earlier version took and this one does not: refused by name, with what to use now. CHANGELOG.md has the figures."""

from __future__ import annotations

import os
from collections.abc import Mapping

from losia_dist.errors import ConfigError

# Environment variable -> the value that asks for what is left, and what was removed.
_VARIABLES = {
    "LOSIA_KERNELS": (
        "none",
        "the Triton kernels were removed, since no GPU ever measured a gain (CHANGELOG.md); plain torch does their work",
    ),
}


def removed_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment says about what was removed, to be compared over the ranks."""
    return {name: environment.get(name, kept) for name, (kept, _) in _VARIABLES.items()}


def refuse_removed_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: ConfigError where an environment variable asks for what was removed."""
    for name, value in removed_variables(environment).items():
        kept, why = _VARIABLES[name]
        if value != kept:
            raise ConfigError(f"{name}={value}: {why}. Unset {name}.")
