"""Which releases of other packages this one admits, by the metadata that setup.cfg became, and whether they are installed."""

from __future__ import annotations

import contextlib
from importlib import metadata

from losia_dist.errors import ConfigError


def requirements() -> list[tuple[str, str, str]]:
    """(name, bounds, extra); empty where the package is run without being installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("losia_dist") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement = Requirement(line)
        marker = str(requirement.marker or "")
        found.append((requirement.name, str(requirement.specifier), marker.rpartition("==")[2].strip(" \"'")))
    return found


def installed(name: str) -> str | None:
    """A package's version; None: it is not there."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def admits(bounds: str, version: str) -> bool:
    """Whether a release lies inside; previews of one count as it."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(version, prereleases=True)


def check_releases(*extras: str) -> None:
    """Each rank by itself, before it joins the others.

    Args:
        extras: those that the run uses, beside what every run needs.

    Raises:
        ConfigError: a package is missing, or of a release that was not tested with this one.
    """
    for name, bounds, extra in requirements():
        if extra and extra not in extras:
            continue
        version, fix = installed(name), f"pip install '{name}{bounds}'"
        if version is None:
            raise ConfigError(f"{name} is not installed{f', which [{extra}] brings' if extra else ''}: {fix}.")
        if not admits(bounds, version):
            raise ConfigError(f"{name} {version} is installed, and this release needs {name}{bounds}: {fix}.")
