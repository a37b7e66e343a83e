"""LoSiA's settings in one level, as stored runs have them and as variants change them one at a time."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from losia_dist import Drawn, Located, LoSiAConfig


def config_of(settings: dict[str, Any]) -> LoSiAConfig:
    """The configuration that these settings are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the form of an earlier version is kept here on purpose
        shares = settings.get("share_columns", False)
        config = LoSiAConfig.from_dict({name: value for name, value in settings.items() if name != "share_columns"})
    if isinstance(config.selection, Drawn):
        config = replace(config, selection=replace(config.selection, share_columns=shares))
    return config


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
        **({"share_columns": True} if config.share_columns else {}),  # runs of before have columns of their own
    }
