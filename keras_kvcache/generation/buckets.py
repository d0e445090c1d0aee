"""The few sizes that programs are compiled for."""

# A prompt is run in chunks of these sizes, so that prompts of all lengths need
# three programs.
CHUNKS = (32, 128, 512)

# Caches have 256, 512, 1024, 2048, 3072, 4096, 6144, … slots: large ones take memory
# and, filled, time; small ones are worth no more programs.
SMALLEST_CAPACITY = 256
LARGEST_DOUBLED = 2048


def capacity_for(length, limit=None):
    """Slots for `length` tokens: the next size, at most `limit` if there is one."""
    capacity = SMALLEST_CAPACITY
    while capacity < length:
        capacity *= 2
    if capacity > LARGEST_DOUBLED and length <= capacity * 3 // 4:
        capacity = capacity * 3 // 4
    return capacity if limit is None else min(capacity, limit)


def chunk_sizes(length):
    """Cuts a prompt of `length` tokens.

    The last chunk may reach past the prompt, but by less than half: a longer rest
    would cost more than the chunks that it saves.

    Returns:
        A list of sizes from `CHUNKS` whose sum is at least `length`.
    """
    sizes, rest = [], length
    while rest > 0:
        covering = [size for size in CHUNKS if size >= rest]
        if covering and (covering[0] < 2 * rest or covering[0] == CHUNKS[0]):
            size = covering[0]
        else:
            size = max(size for size in CHUNKS if size <= rest)
        sizes.append(size)
        rest -= size
    return sizes
