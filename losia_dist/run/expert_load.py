"""How evenly tokens fall on experts, and how many experts trained: for logs and the report."""

from __future__ import annotations

import torch

from losia_dist.run.parts import RunParts
from losia_dist.subnet.site import Site


class ExpertLoad:
    """Reads what each weight of experts has counted in training since it was read last.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: RunParts) -> None:
        # A module's weights see the same tokens: one of them counts for all.
        seen: set[tuple[int, tuple[int, int] | None]] = set()
        self._sites: list[Site] = []
        for site in parts.sites:
            if site.experts is not None and (id(site.module), site.experts) not in seen:
                seen.add((id(site.module), site.experts))
                self._sites.append(site)
        self._collectives = parts.collectives

    def read(self) -> dict[str, float]:
        """Numbers for a log; none for a model without experts. Called by all ranks; waits for the device.

        "experts_trained": share of the experts that a token of any rank reached, 0 to 1. "experts_busiest": tokens of the
        busiest expert as a multiple of the mean of its layer, of the layer where that is largest; 1 is even.
        """
        if not self._sites:
            return {}
        counts = [site.count_tokens() for site in self._sites]
        flat = self._collectives.sum_columns(torch.cat(counts))
        layers: dict[int, list[torch.Tensor]] = {}
        for site, part in zip(self._sites, flat.split([c.numel() for c in counts]), strict=True):
            layers.setdefault(id(site.module), []).append(part)
        whole = [torch.cat(parts).double() for parts in layers.values()]
        busiest = torch.stack([one.max() / one.mean().clamp(min=1e-9) for one in whole]).max()
        return {"experts_trained": (flat > 0).double().mean().item(), "experts_busiest": busiest.item()}
