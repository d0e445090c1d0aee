"""Generation compiles few programs, whatever it is asked for."""

import collections

import jax
import numpy as np
import pytest
from conftest import make_lm

from keras_kvcache import samplers
from keras_kvcache.generation.buckets import CHUNKS, capacity_for, chunk_sizes

pytestmark = pytest.mark.jax_only


@pytest.fixture
def compilations():
    """Counts the programs that XLA compiles while it is in use."""
    counts = collections.Counter()

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            counts["programs"] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.slow
def test_200_generations_compile_a_few_programs(compilations):
    lm = make_lm(num_layers=1)
    rng = np.random.default_rng(3)
    compilations.clear()
    asked = set()
    for number in range(200):
        length = int(rng.integers(1, 300))
        new_tokens = int(rng.integers(1, 300))
        asked.add((length, new_tokens))
        lm.generate(
            rng.integers(0, 101, length).tolist(),
            max_new_tokens=new_tokens,
            sampler=samplers.top_p(0.5 + number / 500, temperature=1 + number / 100),
            seed=number,
            stop_token_ids=rng.integers(0, 101, number % 7).tolist(),
        )
    assert len(asked) == 200  # each of another length
    # For each capacity from 256 to 1024 a decode loop and a program for each size of a
    # chunk, and some small ones that fill new segments with zeros.
    assert 0 < compilations["programs"] <= 3 * (1 + len(CHUNKS)) + 4


def test_a_new_capacity_compiles_its_own_programs_once(compilations):
    lm = make_lm(num_layers=1)
    lm.generate([1, 2, 3], max_new_tokens=5)
    compilations.clear()
    lm.generate([1, 2, 3], max_new_tokens=300)
    first = compilations["programs"]
    # The decode loop and a chunk's; besides what makes or fills a new segment.
    assert 0 < first <= 2 * 2
    lm.generate([4, 5, 6, 7], max_new_tokens=299)
    list(lm.stream([4, 5, 6, 7], max_new_tokens=280))
    assert compilations["programs"] == first


def test_training_in_between_compiles_no_new_generation(compilations):
    lm = make_lm(num_layers=1)
    lm.generate([1, 2, 3], max_new_tokens=5)
    lm.weights[0].assign(lm.weights[0] * 2)
    compilations.clear()
    lm.generate([1, 2, 3], max_new_tokens=5)
    assert compilations["programs"] == 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 64, 65, 100, 255, 256, 999])
def test_chunks_cover_a_prompt_without_much_waste(length):
    sizes = chunk_sizes(length)
    assert set(sizes) <= set(CHUNKS)
    assert sum(sizes[:-1]) < length <= sum(sizes)
    assert sum(sizes) - length < max(CHUNKS[0], sizes[-1] / 2)


@pytest.mark.parametrize("length", [1, 256, 257, 1025, 2048, 2049, 3073, 4097, 6145])
def test_a_room_is_not_much_too_large(length):
    capacity = capacity_for(length)
    assert length <= capacity == capacity_for(capacity)
    assert capacity == 256 or capacity < length * (2 if capacity <= 2048 else 1.5)
    assert capacity_for(length, limit=length) == length


def test_rooms_are_few():
    """At most two from a power of two to the next."""
    for exponent in range(8, 14):
        lengths = range(2**exponent + 1, 2 ** (exponent + 1) + 1)
        assert len({capacity_for(length) for length in lengths}) <= 2
    assert len({capacity_for(length) for length in range(1, 257)}) == 1
