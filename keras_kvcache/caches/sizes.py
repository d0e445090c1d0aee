"""How many slots a segment has."""

# Slots of the first segment: small enough that a short text costs little to
# read, large enough that a long one has few segments to merge and compile.
FIRST_SEGMENT = 256


def segment_sizes(capacity):
    """How `capacity` slots are cut: 256, 256, 512, 1024, …, the last cut short.

    Each segment doubles what was there, so a text is read at most twice as far
    as it reaches, in a number of segments that grows with the logarithm.
    """
    sizes, total = [], 0
    while total < capacity:
        size = min(max(total, FIRST_SEGMENT), capacity - total)
        sizes.append(size)
        total += size
    return tuple(sizes)


def whole_groups(slots, group):
    """The least multiple of `group` that isn't below `slots`."""
    return -(-slots // group) * group


def ring_slots(window, group):
    """Slots of a ring in which a window of tokens stays readable.

    A group of tokens that begins takes the place of a whole one, which must be out
    of sight of all later queries.
    """
    return whole_groups(window + group - 1, group)
