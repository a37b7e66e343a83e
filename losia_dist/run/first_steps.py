"""What is looked at in a run's first steps until it was seen once: subnets train, ranks agree, gradients are their mean."""

from __future__ import annotations

from losia_dist.run.checks import EngagementCheck
from losia_dist.run.drift import DriftCheck
from losia_dist.run.gradient_check import GradientCheck
from losia_dist.run.parts import RunParts
from losia_dist.sharding.sequence_parallel import SequenceRanks
from losia_dist.subnet.site import Site


class FirstSteps:
    """Three checks that end by themselves. Made and called by all ranks.

    Args:
        sequence: as `GradientCheck` takes it.
        engaged: the run goes on from a step after which every subnet was seen to train.
    """

    def __init__(self, parts: RunParts, sequence: SequenceRanks, *, engaged: bool = False) -> None:
        self._parts, self._sequence = parts, sequence
        for site in parts.sites:
            site.gradient_witness = None
        self._engagement = None if engaged else EngagementCheck(parts)
        self._drift: DriftCheck | None = DriftCheck(parts)
        self._gradients = GradientCheck(parts, sequence)

    @property
    def engaged(self) -> bool:
        """Whether every subnet was seen to train."""
        return self._engagement is None

    def anew(self, *, engaged: bool = False) -> FirstSteps:
        """The same checks from the beginning, of subnets that stand elsewhere now."""
        self.remove()
        return FirstSteps(self._parts, self._sequence, engaged=engaged)

    def verify(self, rates: dict[str | None, float]) -> None:
        """Call after each step; `rates` maps a group to the learning rate it was stepped with.

        Raises:
            EngagementError, DivergenceError: as the three checks. Same on every rank.
        """
        if self._engagement and self._engagement.verify(rates):
            self._engagement = None
        if self._drift and self._drift.verify():
            self._drift = None
        if self._drift is None:
            self._gradients.verify()
        else:  # nothing has changed yet: whether gradients are reduced at all is told first, and better
            self._gradients.forget()

    def moved(self, sites: list[Site]) -> None:
        """These layers got other subnets."""
        if self._engagement is not None:
            self._engagement.moved(sites)

    def forget(self) -> None:
        """The engine left a step out."""
        self._gradients.forget()

    def remove(self) -> None:
        """Leave sites and optimizer as they were found."""
        self._gradients.remove()
        for site in self._parts.sites:
            site.gradient_witness = None
