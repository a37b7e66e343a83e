"""The ablation: LoSiA with one thing changed at a time, by name."""

from __future__ import annotations

from typing import Any

from benchmarks.methods import NEVER

# In a run of 60 steps the default period moves no subnet. What concerns moving is varied from here: T = 2, and as many
# layers a slot as locate each of 30 layers once.
MOVING: dict[str, Any] = {"period": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "random start": {"init": "random"},
    "random start, moving": {**MOVING, "init": "random"},
    "located start, kept": {"init": "importance", "period": NEVER},
    "greedy": {"selection": "greedy"},
    "alternating": {"selection": "alternating"},
    "moving, T = 2": MOVING,
    "moving, T = 5": {"period": 5},
    "moving, T = 10": {"period": 10, "layers_per_slot": 6},
    "moving, 3 layers a slot": {**MOVING, "layers_per_slot": 3},
    "moving, 6 layers a slot": {**MOVING, "layers_per_slot": 6},
    "moving, not rewarmed": {**MOVING, "rewarm_steps": 0},
    "moving, moments kept": {**MOVING, "keep_moments": True},
    "moving, bias correction not restarted": {**MOVING, "reset_bias_correction": False},
    "rank factor 1/16": {"rank_factor": 1 / 16},
    "rank factor 1/8": {"rank_factor": 1 / 8},
    "rank factor 1/4": {"rank_factor": 1 / 4},
    "shape 1 x 1/64": {"rank_factor": [1.0, 1 / 64]},
    "shape 1/4 x 1/16": {"rank_factor": [1 / 4, 1 / 16]},
    "shape 1/16 x 1/4": {"rank_factor": [1 / 16, 1 / 4]},
    "shape 1/64 x 1": {"rank_factor": [1 / 64, 1.0]},
}


def variant_of(options: dict[str, Any]) -> str | None:
    """Name of the variant with these options, or None."""
    return next((name for name, wanted in VARIANTS.items() if wanted == options), None)
