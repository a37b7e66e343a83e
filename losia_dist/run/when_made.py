"""What integrations do in a process that gets a conductor: told here, so that nothing of torch is imported to tell it."""

from __future__ import annotations

from collections.abc import Callable

WHEN_MADE: list[Callable[[], None]] = []
