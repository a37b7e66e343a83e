"""Guards builds (`ranks/build_locks.py`) from the moment on in which torch's loader of extensions is imported, by whomever.

DeepSpeed, Accelerate or TrainingArguments may build before anything of this package is called, and importing torch to be ready
for that would make every command wait for it.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_LOADER = "torch.utils.cpp_extension"


def guard_later() -> None:
    """Have builds guarded, now where torch's loader is imported already. Imports nothing else by itself."""
    if _LOADER in sys.modules:
        _guard()
    elif not any(isinstance(finder, _BeforeTheLoader) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTheLoader())


class _BeforeTheLoader(MetaPathFinder):
    """Finds nothing; it is asked for torch's loader once."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> None:
        if name == _LOADER:
            sys.meta_path.remove(self)
            _guard()


def _guard() -> None:
    from losia_dist.ranks.build_locks import guard_builds

    guard_builds()
