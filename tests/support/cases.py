"""Cases of parametrized tests, with those that only `make test-full` runs marked where they stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A case that takes seconds, and beside which another case of the same test shows almost the same."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def only(often: Collection[str], cases: Mapping[str, Any] | Collection[str]) -> list[Any]:
    """All cases by their names; those that `often` does not name are slow."""
    return grid(cases, often=often)


def grid(*axes: Mapping[str, Any] | Collection[str], often: Collection[str]) -> list[Any]:
    """Every combination of the axes' values, named by its labels with hyphens between; slow where `often` does not name it."""
    labelled = [axis.items() if isinstance(axis, Mapping) else [(label, label) for label in axis] for axis in axes]
    cases = {"-".join(label for label, _ in entries): [value for _, value in entries] for entries in product(*labelled)}
    if unknown := set(often) - cases.keys():
        raise ValueError(f"no such case: {sorted(unknown)[0]}; there are {list(cases)}")
    return [pytest.param(*values, id=name, marks=() if name in often else pytest.mark.slow) for name, values in cases.items()]
