"""Into what parts the experts of a layer are cut for localization. Without torch: a plan needs it too."""

from __future__ import annotations

MOST_ELEMENTS = 1 << 29  # of the full gradient that one part forms: 1 GiB in bf16


def parts_of(experts: int, elements: int, asked: int | str | None) -> list[tuple[int, int]]:
    """Experts [start, stop) of each part that localizes by itself (docs/algorithm.md, "Experts").

    experts: E. elements: numbers in one expert's matrices. asked: `experts_per_slot`; None: one part.
    """
    if asked is None:
        return [(0, experts)]
    if asked == "auto":
        asked = -(-experts // -(-experts * elements // MOST_ELEMENTS))
    assert isinstance(asked, int)
    return [(start, min(experts, start + asked)) for start in range(0, experts, asked)]
