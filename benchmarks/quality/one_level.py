"""LoSiA's settings in one level, as stored runs have them and as variants change them one at a time."""

from __future__ import annotations

from typing import Any

from losia_dist import Drawn, Located, LoSiAConfig

_REDUCTIONS = {"reduced": "all", "rank_parallel": "by_rank"}
_OF_LOCATED = {"importance": "importance", "importance_betas": "betas", "init": "start", "localization": "reduction"}


def config_of(settings: dict[str, Any]) -> LoSiAConfig:
    """The configuration that these settings are; what its selection does not have is left out."""
    rest, options = dict(settings), {}
    is_drawn = rest.pop("selection", "greedy") == "random"
    for name in [*_OF_LOCATED, "outlier_limit", "calibration_batches"]:
        if name in rest:
            value = rest.pop(name)
            if name == "calibration_batches" or is_drawn == (name == "outlier_limit"):
                options[_OF_LOCATED.get(name, name)] = _REDUCTIONS.get(str(value), value)
    return LoSiAConfig.from_dict({**rest, "selection": {"drawn" if is_drawn else "located": options}})


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
    }
