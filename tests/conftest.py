"""Fixtures that all tests share."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

# DeepSpeed reads it at import, and finds ninja for its first build on the PATH.
if "CUDA_VISIBLE_DEVICES" not in os.environ:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]

if "LOSIA_DATA_CACHE" not in os.environ:  # not the user's; workers and launches inherit it
    os.environ["LOSIA_DATA_CACHE"] = tempfile.mkdtemp(prefix="losia-data-")
    atexit.register(shutil.rmtree, os.environ["LOSIA_DATA_CACHE"], ignore_errors=True)

import pytest
import torch

from tests.support.pool import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """ranks(world_size, function, *args) -> results in rank order; ranks.errors(...) -> what each rank raised."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Files whose single tests take longest, first: what is left at the end are small pieces, so that no worker waits for another.
FIRST = ("launch", "integrations", "parity", "engines", "checkpoint")


def pytest_collection_finish() -> None:
    """What was imported stays: no collection in a test goes through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rooms = {room: place for place, room in enumerate(FIRST)}
    items.sort(key=lambda item: rooms.get(item.path.parent.name, len(rooms)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and this machine has none"))
