"""Which releases of other packages this one admits, by the metadata that setup.cfg became, and whether they are installed."""

from __future__ import annotations

import contextlib
from importlib import metadata
from importlib.util import find_spec

from losia_dist.errors import ConfigError

UNKNOWN = "of an unknown release"
_MODULES = {"PyYAML": "yaml"}  # where a package is imported by another name


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
    """A package's version; `UNKNOWN`: it can be imported, and came without metadata; None: it is not there."""
    with contextlib.suppress(metadata.PackageNotFoundError, KeyError):
        version: str | None = metadata.version(name)
        if version:  # a directory that an uninstalled package left has none
            return version
    spec = find_spec(_MODULES.get(name, name.replace("-", "_")))
    return UNKNOWN if spec is not None and spec.origin is not None else None  # a folder named "datasets" is no package


def admits(bounds: str, version: str) -> bool:
    """Whether a release lies inside. Previews of one count as it, "2.10.0a0+b4e4ee8" of a vendor's image too.

    A version that cannot be compared ("unknown") does as well: it says nothing against it.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(version).base_version
    except InvalidVersion:
        return True
    return SpecifierSet(bounds).contains(release)


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
