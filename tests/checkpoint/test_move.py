"""A saved run goes on on another engine and number of ranks, with the losses and weights of the run that never moved."""

from dataclasses import replace
from itertools import product

import pytest

from tests.support import resume as runs

RUN = replace(runs.RUN, steps=12, batch=12)  # divides among 1, 2, 3 and 4 ranks
STEP = 7  # inside a slot: averages are cut anew

PLACES = [
    ("one", 1),
    ("zero0", 1),
    ("ddp", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("fsdp2", 2),
    ("zero2-offload", 2),
    ("zero3-offload", 2),
    ("fsdp2-offload", 2),
    ("ddp", 3),
    ("zero2", 3),
    ("zero3", 3),
    ("fsdp2", 3),
    ("hsdp", 4),
    ("zero3", 4),
]


@pytest.fixture(scope="module")
def saved(request, ranks, tmp_path_factory):
    """Directory of a run saved by each place, and the run on one process that never stopped."""
    wanted = {
        source for item in request.session.items if item.module is request.module for source in [item.callspec.params["source"]]
    }
    directories = {}
    for engine, world in sorted(wanted | {("one", 1)}, key=lambda place: (place[1], place[0])):
        directories[engine, world] = tmp_path_factory.mktemp(f"{engine}-{world}")
        result = ranks(world, runs.train_and_save, engine, RUN, directories[engine, world], (STEP,))[0]
        if (engine, world) == ("one", 1):
            undisturbed = result
    return directories, undisturbed


def pairs():
    everything = sorted(product(PLACES, PLACES), key=lambda pair: pair[1][1])
    for source, target in everything:
        name = f"{source[0]}@{source[1]}-to-{target[0]}@{target[1]}"
        yield pytest.param(source, target, id=name)


@pytest.mark.slow
@pytest.mark.parametrize("source, target", pairs())
def test_a_run_goes_on_elsewhere(ranks, saved, source, target):
    directories, undisturbed = saved
    engine, world = target
    for result in ranks(world, runs.resume, engine, RUN, directories[source], None):
        assert result["first"] == STEP
        runs.assert_equal(result, undisturbed, tolerance=1e-5)
