"""Every formula that training, planning and reporting share, written once.

Symbols as in docs/algorithm.md: a target weight is [m, n] (m output neurons, n input neurons), T the period in optimizer
steps, L the number of groups. All functions are pure Python on plain numbers.
"""

from __future__ import annotations

import math


def subnet_size(size: int, factor: float) -> int:
    """floor(factor * size): rows or columns of a subnet (LoSiA, section 3.1).

    The product is rounded to nine decimals first, so that 0.29 * 100 counts as 29 and not as 28.999999999999996.
    """
    return min(size, math.floor(round(factor * size, 9)))


def slot_of(step: int, period: int) -> int:
    """Time slot k = t // T of the 0-based optimizer step t."""
    return step // period


def ends_slot(step: int, period: int) -> bool:
    """Whether the 0-based optimizer step is the last one of its slot."""
    return (step + 1) % period == 0


def localizing_groups(slot: int, num_groups: int, per_slot: int) -> list[int]:
    """Groups that accumulate importance during a slot: per_slot consecutive ones, modulo the number of groups."""
    count = min(per_slot, num_groups)
    return [(slot * count + offset) % num_groups for offset in range(count)]


def takes_importance(step: int, period: int, count: int | None) -> bool:
    """Whether importance is taken in a 0-based step: in `count` steps of each slot, spread evenly, its last one included."""
    if count is None:
        return True
    done = step % period
    return (done + 1) * count // period > done * count // period


def cycle_steps(num_groups: int, period: int, per_slot: int) -> int:
    """Optimizer steps after which every group was re-localized once."""
    return math.ceil(num_groups / min(per_slot, num_groups)) * period


def layers_per_slot_for(steps: int, num_groups: int, period: int, cycles: int = 1) -> int | None:
    """Fewest groups per slot with which a run of `steps` locates every group `cycles` times; None: it has too few slots.

    A slot that ends with the run is not counted: what it locates would never train.
    """
    slots = max(0, steps - 1) // period // cycles
    return math.ceil(num_groups / slots) if slots else None


def rewarm_scale(steps_since: int | None, rewarm_steps: int) -> float:
    """Learning rate factor of a group in its j-th step (0-based) after re-localization: min(1, (j + 1) / rewarm_steps).

    `steps_since` None: the group was never re-localized, so the run's own warmup is all it needs.
    """
    if steps_since is None or rewarm_steps == 0:
        return 1.0
    return min(1.0, (steps_since + 1) / rewarm_steps)


def row_block(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows [start, stop) of a score that this rank keeps; equal blocks of ceil(m / world_size), the last ones shorter."""
    block = -(-size // world_size)
    start = min(size, rank * block)
    return start, min(size, start + block)


def ring_bytes(size: int, world_size: int) -> int:
    """Bytes a rank sends in an all-gather or a reduce-scatter of `size` bytes in all; an all-reduce is two of them."""
    return size * (world_size - 1) // world_size


def step_checkpoint_bytes(elements: int, indices: int) -> int:
    """One step's checkpoint: fp32 masters and two moments of the subnets' elements, int64 indices."""
    return 12 * elements + 8 * indices


def journal_bytes(elements: int, indices: int, bytes_of_weight: int = 2) -> int:
    """What a checkpoint adds for subnets that have moved since: the values they left in the weights, and their old indices."""
    return bytes_of_weight * elements + 8 * indices


def importance_checkpoint_bytes(elements: int) -> int:
    """Both fp32 averages of the weights that localize, while a slot is in progress."""
    return 8 * elements


def full_checkpoint_bytes(parameters: int, bytes_of_weight: int = 2) -> int:
    """A checkpoint of full fine-tuning: weights, fp32 masters, two moments."""
    return parameters * (bytes_of_weight + 12)
