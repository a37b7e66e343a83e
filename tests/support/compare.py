"""Equality with the reference: losses and whole weights to 1e-5, selected indices exactly."""

from __future__ import annotations

from typing import Any

import torch


def assert_same_run(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert len(result["losses"]) == len(expected["losses"])
    worst = max(abs(a - b) for a, b in zip(result["losses"], expected["losses"], strict=True))
    assert worst <= tolerance, f"losses differ by {worst:.2e}"
    assert len(result["history"]) == len(expected["history"]) > 0
    for (step, name, ours), (step_expected, _, theirs) in zip(result["history"], expected["history"], strict=True):
        assert step == step_expected and ours.keys() == theirs.keys()
        for weight, (rows, columns) in theirs.items():
            assert torch.equal(ours[weight][0].cpu(), rows), f"rows of {weight} after step {step} ({name})"
            assert torch.equal(ours[weight][1].cpu(), columns), f"columns of {weight} after step {step} ({name})"
    assert result["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        difference = (result["weights"][name] - weight).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference:.2e}"
