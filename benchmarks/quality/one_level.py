"""LoSiA's settings in one level, as stored runs have them and as variants change them one at a time."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from losia_dist import Drawn, Located, LoSiAConfig

# Settings that came after the first runs were stored, and what those runs did; a run names what it does otherwise.
_LATER: dict[str, Any] = {"share_columns": False, "importance_steps": None}


def config_of(settings: dict[str, Any]) -> LoSiAConfig:
    """The configuration that these settings are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the form of an earlier version is kept here on purpose
        config = LoSiAConfig.from_dict({name: value for name, value in settings.items() if name not in _LATER})
    selection, given = config.selection, {name: settings.get(name, before) for name, before in _LATER.items()}
    fields = vars(selection)
    return replace(config, selection=replace(selection, **{name: value for name, value in given.items() if name in fields}))


def flat(config: LoSiAConfig) -> dict[str, Any]:
    """The settings of a configuration; what its selection does not have stands at its default."""
    located = config.located or Located()
    return {
        **config.to_dict(),
        "selection": "random" if isinstance(config.selection, Drawn) else "greedy",
        "importance": located.importance,
        "importance_betas": list(located.betas),
        "init": located.start,
        "localization": "rank_parallel" if config.by_rank else "reduced",
        "calibration_batches": config.calibration_batches,
        "outlier_limit": config.outlier_limit,
        **{name: value for name, value in vars(config.selection).items() if name in _LATER and value != _LATER[name]},
    }
