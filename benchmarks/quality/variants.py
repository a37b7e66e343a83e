"""The ablation: LoSiA with one thing changed at a time, by name."""

from __future__ import annotations

from typing import Any

from benchmarks.methods import NEVER

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "random start": {"init": "random"},
    "random start, kept": {"init": "random", "period": NEVER, "layers_per_slot": 1},
    "located start, kept": {"period": NEVER, "layers_per_slot": 1},
    "alternating": {"selection": "alternating"},
    "one cycle": {"cycles": 1},
    "T = 2": {"period": 2},
    "T = 5, two cycles": {"period": 5, "cycles": 2},
    "T = 10, one cycle": {"period": 10, "cycles": 1},
    "one layer a slot": {"layers_per_slot": 1},
    "not rewarmed": {"rewarm_steps": 0},
    "rewarmed over the period": {"rewarm_steps": None},
    "moments kept": {"moments": "kept"},
    "bias correction not restarted": {"reset_bias_correction": False},
    "flat noise 0.05": {"noise": 0.05},
    "steps over input size": {"column_exponent": 1.0},
    "output layer, 1/8 of its rows": {"output_rank_factor": 0.125},
    "embeddings too": {"train_embeddings": True},
    "norms frozen": {"train_norms": False},
    "rank factor 1/16": {"rank_factor": 1 / 16},
    "rank factor 1/8": {"rank_factor": 1 / 8},
    "rank factor 1/4": {"rank_factor": 1 / 4},
    "shape 1 x 1/64": {"rank_factor": [1.0, 1 / 64]},
    "shape 1/4 x 1/16": {"rank_factor": [1 / 4, 1 / 16]},
    "shape 1/16 x 1/4": {"rank_factor": [1 / 16, 1 / 4]},
    "shape 1/64 x 1": {"rank_factor": [1 / 64, 1.0]},
    # What `losia-dist allocate` says of SmolLM2-135M; all other modules 1/2 x 1/32.
    "shape per module": {"rank_pattern": {"q_proj": [1 / 4, 1 / 16], "k_proj": [1 / 4, 1 / 16], "up_proj": [1 / 32, 1 / 2]}},
}


def variant_of(options: dict[str, Any]) -> str | None:
    """Name of the variant with these options, or None."""
    return next((name for name, wanted in VARIANTS.items() if wanted == options), None)
