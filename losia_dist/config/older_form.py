"""`LoSiAConfig` as it was when what chooses subnets stood beside everything else: read, with the line that it is now."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from losia_dist.config.selection import plain_selection, read_selection
from losia_dist.errors import ConfigError

# The name and the values that each of them had -> those of the field it is now.
_NOW: dict[str, tuple[str, dict[str, str]]] = {
    "importance": ("importance", {}),
    "importance_betas": ("betas", {}),
    "init": ("start", {}),
    "calibration_batches": ("calibration_batches", {}),
    "localization": ("reduction", {"reduced": "all", "rank_parallel": "by_rank"}),
    "outlier_limit": ("outlier_limit", {}),
}
_OF_DRAWN = ("outlier_limit", "calibration_batches")


def nested(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings in which what chooses subnets stands under selection, whichever form they have. Warns once for the older one.

    Raises: ConfigError where the older form asks for a selection and for what only the other has.
    """
    old = {name: value for name, value in values.items() if name in _NOW}
    if not old:
        return dict(values)
    kind, options = _selection_of(old, values.get("selection", "greedy"), source)
    now = read_selection({kind: options})
    changed = {name: value for name, value in options.items() if value != getattr(type(now)(), name)}
    line = f"selection: {{{kind}: {json.dumps(changed)}}}".replace('"', "")
    warnings.warn(f"{source}: {', '.join(old)} stand under selection now. Write: {line}", FutureWarning, stacklevel=3)
    return {**{name: value for name, value in values.items() if name not in _NOW}, "selection": plain_selection(now)}


def refuse_flat(names: Mapping[str, Any]) -> None:
    """Raises: ConfigError where `LoSiAConfig(...)` is called with one of these names."""
    for name in names:
        if name in _NOW:
            kind = "Drawn" if name == "outlier_limit" else "Located"
            raise ConfigError(f"LoSiAConfig has no {name} any more: give selection={kind}({_NOW[name][0]}=...).")


def _selection_of(old: Mapping[str, Any], given: Any, source: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(given, str) or given not in ("greedy", "random"):
        raise ConfigError(f"{source}: {', '.join(old)} stand beside selection={given!r}: move them into it.")
    drawn = given == "random"
    options: dict[str, Any] = {}
    for name, value in old.items():
        field, renamed = _NOW[name]
        if drawn != (name in _OF_DRAWN) and name != "calibration_batches":
            if value in (None, "random", "reduced", "param_mix", [0.85, 0.85], (0.85, 0.85)):
                continue  # it asked for nothing
            other = "random" if name == "outlier_limit" else "greedy"
            raise ConfigError(
                f"{source}: {name}={value!r} has no meaning with selection={given!r}: leave it out, or take {other!r}."
            )
        options[field] = renamed.get(value, value) if isinstance(value, str) else value
    return ("drawn" if drawn else "located"), options
