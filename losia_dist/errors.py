"""Every error the package raises on purpose; each message names the value, the rule and the fix."""

from collections.abc import Iterable


class LoSiAError(Exception):
    """Base class: `except LoSiAError` catches everything this package refuses."""


class ConfigError(LoSiAError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class UnsupportedError(ConfigError):
    """A combination of engine features that the support matrix lists as refused."""


class DataError(LoSiAError, ValueError):
    """Training data that is missing, malformed, empty or too long."""


class EngagementError(LoSiAError, RuntimeError):
    """A subnet that does not train: no gradient reached it, or its values never changed."""


class DivergenceError(LoSiAError, RuntimeError):
    """Ranks that disagree, or values that are no longer finite."""


class CheckpointError(LoSiAError, RuntimeError):
    """A checkpoint that cannot be written, or that is damaged, incomplete or not this run's."""


def some(things: Iterable[object], most: int = 5) -> str:
    """The first few of the things that a message is about, and how many more there are: "a, b and 7 more"."""
    shown = [str(thing) for thing in things]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
