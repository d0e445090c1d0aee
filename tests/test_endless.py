"""Text that goes on past every window, in memory that doesn't grow."""

import conftest
import keras
import numpy as np
import pytest

from keras_kvcache import DecoderLM
from keras_kvcache.caches import Rolling, RollingCache, Static, StaticCache

W = 11


@pytest.fixture(scope="module")
def sliding():
    """A small model all of whose layers slide."""
    return conftest.make_lm("windowed")


def test_layers_get_the_cache_that_suits_them():
    lm = conftest.make_lm("windowed", num_layers=5, sliding_window_pattern=3)
    assert [block.sliding_window for block in lm.blocks] == [W, W, None, W, W]
    kinds = [type(cache) for cache in lm.init_cache(2, 100)]
    assert kinds == [RollingCache] * 2 + [StaticCache] + [RollingCache] * 2
    # A window that holds all of a text need not roll.
    assert {type(cache) for cache in lm.init_cache(2, W)} == {StaticCache}
    assert {type(cache) for cache in lm.init_cache(2, 100, kind="static")} == {
        StaticCache
    }


@pytest.mark.parametrize(
    "codec, layout",
    [("float32", "head_major"), ("float32", "dense"), ("int8", "head_major")],
)
def test_tokens_equal_those_of_a_static_cache(sliding, codec, layout):
    """Prompts shorter and longer than the window, in one batch."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 101, size).tolist() for size in (3, 37, W)]
    options = {"codec": codec, "layout": layout}
    rolling, static = (
        sliding.generate(prompts, max_new_tokens=60, cache={**options, "kind": kind})
        for kind in ("rolling", "static")
    )
    assert rolling == static
    assert sliding.generate(prompts, max_new_tokens=60, cache=options) == rolling


def test_rows_of_a_ragged_batch_equal_each_alone(sliding):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 101, size).tolist() for size in (2, 71, 5)]
    together = sliding.generate(prompts, max_new_tokens=40)
    alone = [sliding.generate(prompt, max_new_tokens=40) for prompt in prompts]
    assert together == alone


def test_sinks_stay():
    """A full-attention model with a window and sinks keeps to what they span."""
    lm = conftest.shared_lm("llama")
    prompt = np.random.default_rng(2).integers(0, 101, 23).tolist()
    full = lm.generate(prompt, max_new_tokens=30)
    wide = lm.generate(prompt, max_new_tokens=30, cache=Rolling(97, sinks=2))
    narrow = lm.generate(prompt, max_new_tokens=30, cache=Rolling(5))
    with_sinks = lm.generate(prompt, max_new_tokens=30, cache=Rolling(5, sinks=3))
    assert wide == full
    assert len({tuple(tokens) for tokens in (full, narrow, with_sinks)}) == 3


def test_goes_on_past_the_longest_sequence(sliding):
    """And only there: an endless text needs a limit of the caller's."""
    limit = sliding.max_sequence_length
    tokens = sliding.generate([5, 7], max_new_tokens=limit + 50)
    assert len(tokens) == limit + 52
    assert len(sliding.generate([5, 7])) == limit
    for cache in ("static", Static()):
        bounded = sliding.generate([5, 7], max_new_tokens=limit + 50, cache=cache)
        assert bounded == tokens[:limit]


@pytest.mark.slow
@pytest.mark.jax_only
def test_a_hundred_thousand_tokens_in_constant_memory():
    import jax

    keras.utils.set_random_seed(1)
    lm = DecoderLM(
        vocabulary_size=101,
        num_layers=2,
        num_query_heads=2,
        hidden_dim=44,
        intermediate_dim=23,
        sliding_window=67,
        max_sequence_length=613,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.4),
    )

    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    stream = lm.stream([3, 5], max_new_tokens=100_000, sampler="random", seed=1)
    sizes, count = [], 0
    for count, _ in enumerate(stream, start=1):
        if count % 10_000 == 0:
            sizes.append(held())
    assert count == 100_000 and len(sizes) == 10
    assert max(sizes) <= 1.01 * sizes[0]
    # What all layers' caches take doesn't depend on how long the text is to be.
    assert lm.cache_bytes(1, 1_000).total == lm.cache_bytes(1, 100_000).total
    tokens = stream.token_ids[0]
    assert len(set(tokens[-1000:])) > 20  # It goes on being a text.
