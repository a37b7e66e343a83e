"""The ablation: LoSiA with one thing changed at a time, by name."""

from __future__ import annotations

from typing import Any

from benchmarks.methods import NEVER

_LOCATED: dict[str, Any] = {"selection": "greedy", "init": "importance", "outlier_limit": None}
# The recommendation for 1/64 of the weights that are located.
_LOCATED_64: dict[str, Any] = {
    **_LOCATED,
    "rank_factor": [1 / 2, 1 / 32],
    "period": 3,
    "cycles": 3,
    "train_norms": True,
    "calibration_batches": 8,
    "rewarm_steps": 2,
    "reset_bias_correction": True,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "drawn once, kept": {"period": NEVER, "layers_per_slot": 1},
    "located": _LOCATED,
    "located, kept": {**_LOCATED, "period": NEVER, "layers_per_slot": 1},
    "located, random start": {**_LOCATED, "init": "random"},
    "T = 3, three cycles": {"period": 3, "cycles": 3},
    "T = 1, ten cycles": {"period": 1, "cycles": 10},
    "T = 2, one cycle": {"cycles": 1},
    "one layer a slot": {"layers_per_slot": 1},
    "outliers too": {"outlier_limit": None},
    "rewarmed, two steps": {"rewarm_steps": 2},
    "bias correction restarted": {"reset_bias_correction": True},
    "bias correction restarted, rewarmed": {"reset_bias_correction": True, "rewarm_steps": 2},
    "flat noise 0.05": {"noise": 0.05},
    "output layer, 1/8 of its rows": {"output_rank_factor": 0.125},
    "embeddings too": {"train_embeddings": True},
    "norms too, at half the rate": {"train_norms": True, "full_lr_scale": 0.5},
    "rank factor 1/16": {"rank_factor": 1 / 16},
    "rank factor 1/8": {"rank_factor": 1 / 8},
    "rank factor 1/4": {"rank_factor": 1 / 4},
    "shape 1 x 1/64": {"rank_factor": [1.0, 1 / 64]},
    "shape 1/2 x 1/8": {"rank_factor": [1 / 2, 1 / 8]},
    "shape 1/16 x 1": {"rank_factor": [1 / 16, 1.0], "outlier_limit": None},
    "located, 1/64": _LOCATED_64,
    "located, 1/64, norms frozen": {**_LOCATED_64, "train_norms": False},
    "located, 1/64, steps over input size": {**_LOCATED_64, "column_exponent": 1.0},
    # The shapes that hold most importance in SmolLM2-135M, by kind of module; all other modules 1/2 x 1/32.
    "located, 1/64, shape per module": {
        **_LOCATED_64,
        "rank_pattern": {"q_proj": [1 / 4, 1 / 16], "k_proj": [1 / 4, 1 / 16], "up_proj": [1 / 32, 1 / 2]},
    },
}


def variant_of(options: dict[str, Any]) -> str | None:
    """Name of the variant with these options, or None."""
    return next((name for name, wanted in VARIANTS.items() if wanted == options), None)
