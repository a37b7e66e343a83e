"""Settings out of a YAML or JSON file: a name given twice is refused, and 1e-3 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from losia_dist.errors import ConfigError


class _Reader(yaml.SafeLoader):
    """YAML 1.1 takes the last of two equal names, and reads a power of ten without a point as text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Reader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """What a YAML or JSON file holds; an empty file holds nothing.

    what: what the file is, for messages.

    Raises:
        ConfigError: it cannot be read, is neither YAML nor JSON, gives a name twice, or holds something else than settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror or error}. Check its path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not valid YAML or JSON: {error}") from error
    return parse_settings(text, f"{what} {path}")


def parse_settings(text: str, what: str) -> dict[str, Any]:
    """As `read_settings`, of the text itself. Raises: ConfigError."""
    try:
        values = yaml.load(text, Loader=_Reader)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML or JSON: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{what} must hold 'name: value' lines, not {type(values).__name__}.")
    return values
