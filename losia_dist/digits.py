"""Numbers as people read them: three digits that count, never a power of ten where the digits fit."""

from __future__ import annotations

import math


def short(value: float, digits: int = 3) -> str:
    """A number with `digits` digits that count, thousands apart: 1,020; 180; 4.31; 0.00252; 5e-05."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 10**digits - 0.5:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share of 1 in percent with two digits that count: "100 %", "6.2 %", "0.15 %"."""
    return f"{short(100 * share, 2)} %"
