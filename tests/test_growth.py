"""Caches that begin small and grow: the tokens are those of caches made whole."""

import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm

from keras_kvcache import DecoderLM, EncoderDecoderLM, Generator, caches, samplers
from keras_kvcache.caches import Rolling, RollingCache, StaticCache
from keras_kvcache.generation import buckets
from keras_kvcache.generation.buckets import growing_capacities

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def grown(monkeypatch):
    """Has caches of 613 slots begin with 256; gives the capacities they grow to."""
    monkeypatch.setattr(buckets, "MOST_AT_ONCE", 200)
    seen = []
    grow = buckets.Growth.grow

    def spy(self, cache):
        cache = grow(self, cache)
        seen.append(self._capacity)
        return cache

    monkeypatch.setattr(buckets.Growth, "grow", spy)
    return seen


def whole(monkeypatch, function):
    """What a function gives where caches are made whole."""
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "MOST_AT_ONCE", 10**9)
        return function()


def ragged():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 101, length).tolist() for length in (3, 37, 101)]


@pytest.mark.parametrize(
    "length, end, limit, expected",
    [
        (5, 1029, None, (2048,)),
        (5, 1030, None, (256, 1024, 2048)),
        (5, 2500, None, (256, 1024, 2048, 3072)),
        (5, 8192, 8192, (256, 1024, 2048, 4096, 8192)),
        (128, 8192, 8192, (256, 1024, 2048, 4096, 8192)),
        (129, 8192, 8192, (1024, 2048, 4096, 8192)),
        (5, 5003, 5003, (256, 1024, 2048, 4096, 5003)),
        (4090, 8192, 8192, (8192,)),
        (8192, 8192, 8192, (8192,)),
    ],
)
def test_capacities_end_where_segments_do(length, end, limit, expected):
    assert growing_capacities(length, end, limit) == expected


CACHES = {
    "float32": None,
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int4",
    "dense": {"layout": "dense"},
    "rolling": Rolling(29),
}


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("float32", "greedy"),
        ("int8", "greedy"),
        ("dense", "greedy"),
        *(
            pytest.param(name, "greedy", marks=pytest.mark.slow)
            for name in ("bfloat16", "int4", "rolling")
        ),
        ("rolling", "top_k"),
    ],
)
def test_ragged_rows_grow_as_if_made_whole(grown, monkeypatch, name, sampler):
    lm = shared_lm("llama")
    options = dict(
        sampler=samplers.top_k(7) if sampler == "top_k" else None,
        seed=11,
        cache=CACHES[name],
        max_new_tokens=300,
    )
    answers = lm.generate(ragged(), **options)
    # The longest prompt has 101 tokens: 256 slots are full before it has 300 more.
    assert grown == [512]
    assert {len(answer) for answer in answers} == {303, 337, 401}
    assert answers == whole(monkeypatch, lambda: lm.generate(ragged(), **options))


@pytest.mark.parametrize("kind", ["gpt2", "windowed"])
def test_other_models_grow_too(grown, monkeypatch, kind):
    lm = shared_lm(kind)
    answer = lm.generate(PROMPT)
    # Positions of the windowed one have no end.
    assert grown == [1024 if kind == "windowed" else 613]
    assert len(answer) == 613
    assert answer == whole(monkeypatch, lambda: lm.generate(PROMPT))


def test_layers_that_slide_roll_from_the_start(grown, monkeypatch):
    """Of 256 slots a window of 300 could hold all: the last capacity decides."""
    lm = make_lm("windowed", num_layers=2, sliding_window=300, sliding_window_pattern=2)
    kinds = [type(cache) for cache in lm.init_cache(1, 613, room=256)]
    assert kinds == [RollingCache, StaticCache]
    assert lm.init_cache(1, 613, room=256)[1].capacity == 256
    answer = lm.generate(PROMPT)
    assert grown == [613]
    assert answer == whole(monkeypatch, lambda: lm.generate(PROMPT))


def test_streams_grow_as_they_go_on(grown, monkeypatch):
    lm = shared_lm("llama")
    stream = lm.stream(PROMPT)
    pieces = [next(stream) for _ in range(100)]
    assert grown == []
    pieces.extend(stream)
    assert grown == [613]
    assert PROMPT + sum(pieces, []) == whole(monkeypatch, lambda: lm.generate(PROMPT))


def test_an_answer_that_ends_earlier_grows_nothing(grown, monkeypatch):
    """Not even where it ends in the last burst that fits, of tokens 130 to 193."""
    lm = shared_lm("llama")
    answer = whole(monkeypatch, lambda: lm.generate(PROMPT, strip_prompt=True))
    end = next(i for i in range(140, 190) if answer[i] not in answer[:i])
    stop = [answer[end]]
    given = lm.generate(PROMPT, stop_token_ids=stop, strip_prompt=True)
    assert given == answer[: end + 1]
    assert grown == []


def test_growing_adds_a_segment_and_copies_none():
    lm = make_lm(num_layers=1, max_sequence_length=8192)
    (before,) = lm.init_cache(1, 8192, room=256)
    (after,) = caches.resize((before,), 1024, 200)
    assert before.capacity == 256 and after.capacity == 1024
    held, kept = before.storage.segments[0], after.storage.segments[0]
    assert all(a is b for a, b in zip(held, kept, strict=True))
    assert after.storage.sizes == (256, 768)


@pytest.mark.parametrize("cache", [None, {"layout": "dense"}], ids=str)
def test_what_is_encoded_does_not_grow(grown, monkeypatch, cache):
    """It has as many slots as the caches of the decoder at first."""
    keras.utils.set_random_seed(3)
    sound = keras.Input((None, 7), name="encoder_sound")
    encoder = keras.Model({"encoder_sound": sound}, keras.layers.Dense(19)(sound))
    lm = EncoderDecoderLM(encoder, 101, 2, 6, 48, 59, max_sequence_length=613)
    rng = np.random.default_rng(4)
    for weight in lm.weights:  # large enough for varied answers
        if len(weight.shape) > 1:
            weight.assign(rng.normal(0, 0.4, weight.shape))
    inputs = {
        "encoder_sound": rng.normal(size=(2, 256, 7)).astype("float32"),
        "decoder_token_ids": [[3, 1, 4], [1, 5, 9, 2]],
    }
    encoded = lm.encode({"encoder_sound": inputs["encoder_sound"]})
    assert encoded.caches[0].capacity == 256
    before = (lm.init_cache(2, 613, room=256), encoded)
    after, kept = lm._resize_cache(before, 613, 200)
    assert kept is encoded and after[0].capacity == 613
    rows = lm.generate(inputs, cache=cache)
    assert len({*rows[0]}) > 9, "answers vary"
    assert grown == [613] and [len(row) for row in rows] == [613] * 2
    assert rows == whole(monkeypatch, lambda: lm.generate(inputs, cache=cache))


def test_caches_of_ones_own_are_made_whole(grown):
    """Neither a generator's nor a subclass's: nobody knows what is in them."""
    lm, asked = shared_lm("llama"), []

    def init_cache(batch_size, capacity):
        asked.append(capacity)
        return lm.init_cache(batch_size, capacity)

    generator = Generator(
        lm, lm.hidden_with_cache, init_cache, lm.logits, max_sequence_length=613
    )
    assert generator.generate(PROMPT) == lm.generate(PROMPT)
    assert asked == [613] and grown == [613]

    class Own(DecoderLM):
        def init_cache(self, batch_size, max_length=None, **options):
            asked.append(max_length)
            return super().init_cache(batch_size, max_length, **options)

    keras.utils.set_random_seed(1)
    own = Own(101, 1, 2, 8, 7, max_sequence_length=613)
    own.generate(PROMPT, max_new_tokens=3)
    asked.clear()
    assert len(own.generate(PROMPT)) == 613
    assert asked == [613] and grown == [613]


def test_a_generator_of_ones_own_may_let_caches_grow(grown):
    lm = shared_lm("llama")
    generator = Generator(
        lm,
        lm.hidden_with_cache,
        lm.init_cache,
        lm.logits,
        max_sequence_length=613,
        resize_cache=caches.resize,
    )
    assert generator.generate(PROMPT) == lm.generate(PROMPT)
    assert grown == [613, 613]
