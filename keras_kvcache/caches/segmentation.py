"""How many slots a segment has."""

from typing import Any

from keras_kvcache.runtime.platform import current_platform

# Slots of the first segment: small enough that a short text costs little to
# read, large enough that a long one has few segments to merge and compile.
FIRST_SEGMENT = 256


def segment_sizes(capacity: int, kernels_read: bool) -> tuple[int, ...]:
    """How `capacity` slots are cut: 256, 768, 1024, 2048, …, the last cut short.

    The second segment ends at 4 times the first, each later one at twice the one
    before. So past 1024 at most twice the filled slots are read, in few segments;
    kernels stop where the fill ends. The second isn't shorter as XLA's CPU backend
    gives products with 512 slots of 64 numbers or fewer to one core, which reads half
    as fast as two.

    A GPU takes longer to begin a write than to make it, and its kernel reads no further
    than a text reaches; so what it reads is one segment.

    Args:
        capacity: How many slots there are.
        kernels_read: Whether they are held in a form that kernels read.

    Returns:
        A tuple of integers.
    """
    if kernels_read and current_platform().kernel == "gpu":
        return (capacity,)
    sizes, total, end = [], 0, FIRST_SEGMENT
    while total < capacity:
        sizes.append(min(end, capacity) - total)
        total += sizes[-1]
        end *= 4 if end == FIRST_SEGMENT else 2
    return tuple(sizes)


def whole_groups(slots: Any, group: int) -> Any:
    """`slots`, rounded up to a multiple of `group`."""
    return -(-slots // group) * group


def ring_slots(window: int, group: int) -> int:
    """Slots of a ring in which a window of tokens stays readable.

    A new code group overwrites a whole one, which no later query may still attend.
    """
    return whole_groups(window + group - 1, group)
