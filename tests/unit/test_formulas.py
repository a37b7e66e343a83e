"""Sizes, slots and ramps, by hand."""

from losia_dist.formulas import cycle_steps, localizing_groups, rewarm_scale, row_block, subnet_size
from losia_dist.localization.slots import SlotClock


def test_a_subnet_has_the_floor_of_its_share():
    assert subnet_size(4096, 0.125) == 512
    assert subnet_size(77, 0.25) == 19
    assert subnet_size(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996 in floating point
    assert subnet_size(7, 0.125) == 0


def test_row_blocks_cover_every_row_once_even_when_ranks_outnumber_rows():
    for size, world in [(177, 2), (3, 2), (1, 4), (8, 4), (5, 3)]:
        covered = [row for rank in range(world) for row in range(*row_block(size, rank, world))]
        assert covered == list(range(size))


def test_groups_take_turns_and_a_cycle_visits_all():
    assert [localizing_groups(slot, 3, 1) for slot in range(4)] == [[0], [1], [2], [0]]
    assert [localizing_groups(slot, 3, 2) for slot in range(3)] == [[0, 1], [2, 0], [1, 2]]
    assert localizing_groups(5, 3, 8) == [0, 1, 2]
    assert cycle_steps(80, 100, 1) == 8000
    assert cycle_steps(3, 5, 2) == 10


def test_the_ramp_rises_linearly_from_the_first_step_after_relocalization():
    assert [rewarm_scale(since, 4) for since in (0, 1, 2, 3, 4, 99)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rewarm_scale(None, 4) == 1.0
    assert rewarm_scale(0, 0) == 1.0


def test_the_clock_rewarms_only_the_group_that_moved():
    clock = SlotClock(["a", "b"], period=2, per_slot=1, rewarm_steps=2)
    seen = []
    for _ in range(6):
        localizing, ends = clock.localizing, clock.in_last_step
        seen.append((localizing, ends, clock.scale("a"), clock.scale("b"), clock.scale(None)))
        clock.advance(localizing if ends else [])
    assert seen == [
        (["a"], False, 1.0, 1.0, 1.0),
        (["a"], True, 1.0, 1.0, 1.0),
        (["b"], False, 0.5, 1.0, 1.0),
        (["b"], True, 1.0, 1.0, 1.0),
        (["a"], False, 1.0, 0.5, 1.0),
        (["a"], True, 1.0, 1.0, 1.0),
    ]
