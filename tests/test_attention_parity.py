"""Cached attention equals attention over the whole sequence.

The reference is NumPy in float64; it knows neither caches nor segments.
"""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

B, T = 3, 13
CAPACITY = 17
CLOSE = dict(rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, causal",
    [*((kind, True) for kind in cases.KINDS), ("plain", False), ("everything", False)],
)
def test_without_cache(kind, causal):
    layer, rules = cases.make_kind(kind)
    query, value = cases.noise(B, T, cases.D), cases.noise(B, 5, cases.D, seed=1)
    key = cases.noise(B, 5, cases.D, seed=2)
    expected, weights = reference.multi_head_attention(
        layer, query, value, key, causal=causal, **rules
    )

    @cases.compiled
    def call(query, value, key):
        rules = dict(key=key, use_causal_mask=causal)
        return layer(query, value, **rules), layer(
            query, value, return_attention_scores=True, **rules
        )

    output, (output_beside_scores, scores) = call(query, value, key)
    np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)
    output = output_beside_scores
    np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)
    np.testing.assert_allclose(cases.numpy(scores), weights, **CLOSE)


def decode(layer, x, cache, chunks, per_row=False, **options):
    """Feeds `x` in chunks; all outputs in a row, and the last cache."""

    @cases.compiled
    def step(tokens, cache, index):
        return layer(
            tokens,
            tokens,
            cache=cache,
            cache_update_index=index,
            use_causal_mask=True,
            **options,
        )

    outputs, first = [], 0
    for size in chunks:
        index = [first] * len(x) if per_row else first
        tokens = x[:, first : first + size]
        *output, cache = step(tokens, cache, cases.int32(index))
        outputs.append(cases.numpy(output[0]))
        first += size
    return np.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize(
    "kind, layout",
    [
        *((kind, "head_major") for kind in cases.KINDS),
        ("plain", "dense"),
        ("everything", "dense"),
    ],
)
def test_in_chunks(kind, layout):
    layer, rules = cases.make_kind(kind)
    x = cases.noise(B, T, cases.D)
    expected, _ = reference.multi_head_attention(layer, x, x, causal=True, **rules)
    cache = cases.make_cache(layer, B, CAPACITY, layout)
    output, _ = decode(layer, x, cache, [5, 1, 1, 5, 1])
    np.testing.assert_allclose(output, expected, **CLOSE)


@pytest.mark.parametrize(
    "layout, per_row, window",
    [
        ("dense", False, None),
        ("dense", True, 67),
        ("head_major", False, 67),
        ("head_major", True, None),
    ],
)
def test_across_segments(layout, per_row, window):
    """1033 slots are segments of 256, 768 and 9; the chunks straddle their ends."""
    layer = cases.make_layer(
        num_heads=4,
        num_key_value_heads=2,
        key_dim=6,
        rotary_embedding=cases.rotary_layer(),
        sliding_window=window,
    )
    # Angles in float32 are off by 1e-8 of the position: keep their effect small.
    x = 0.5 * cases.noise(2, 1033, cases.D)
    expected, _ = reference.multi_head_attention(
        layer, x, x, causal=True, rotary=dict(base=50.0), window=window
    )
    cache = cases.make_cache(layer, 2, 1033, layout)
    chunks = [251, 1, 1, 7, 759, 1, 1, 11, 1]
    output, _ = decode(layer, x, cache, chunks, per_row)
    np.testing.assert_allclose(output, expected, **CLOSE)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_rows_at_their_own_index(layout):
    """Each row is decoded from where its own prompt ends, padding overwritten."""
    layer, rules = cases.make_kind("everything")
    x = cases.noise(B, T, cases.D)
    expected, _ = reference.multi_head_attention(layer, x, x, causal=True, **rules)
    lengths = np.array([2, 7, 5])
    prompts = np.where(
        np.arange(7)[None, :, None] < lengths[:, None, None], x[:, :7], 9
    )
    cache = cases.make_cache(layer, B, CAPACITY, layout)

    @cases.compiled
    def step(tokens, cache, index):
        return layer(
            tokens, tokens, cache=cache, cache_update_index=index, use_causal_mask=True
        )

    output, cache = step(prompts, cache, cases.int32([0, 0, 0]))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            cases.numpy(output)[row, :length], expected[row, :length], **CLOSE
        )
    for _ in range(T - 7):
        tokens = np.stack([x[row, i : i + 1] for row, i in enumerate(lengths)])
        output, cache = step(tokens, cache, cases.int32(lengths))
        now = np.stack([expected[row, i : i + 1] for row, i in enumerate(lengths)])
        np.testing.assert_allclose(cases.numpy(output), now, **CLOSE)
        lengths = lengths + 1


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kind", ["grouped", "rotary", "soft_cap", "gate"])
def test_filled_once_then_only_read(kind, layout):
    """Cross-attention: mode 3 fills the whole cache, mode 2 reads it."""
    layer, rules = cases.make_kind(kind, value_width=19)
    query, encoded = cases.noise(B, 5, cases.D), cases.noise(B, T, 19, seed=1)
    expected, weights = reference.multi_head_attention(layer, query, encoded, **rules)
    cache = cases.make_cache(layer, B, T, layout)
    write = cases.compiled(
        lambda cache: layer(query, encoded, cache=cache, cache_update_index=0)
    )
    output, cache = write(cache)
    # Where queries stand makes no difference without rotation.
    if kind != "rotary":
        np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)
    stored = cases.entries(cache)

    @cases.compiled
    def read(cache, value=None):
        output, cache = layer(query, value, cache=cache)
        return output, *layer(query, value, cache=cache, return_attention_scores=True)

    for value in ((), (encoded[:, :2],)):
        output, output_beside_scores, scores, cache = read(cache, *value)
        np.testing.assert_allclose(cases.numpy(output_beside_scores), expected, **CLOSE)
        np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)
        np.testing.assert_allclose(cases.numpy(scores), weights, **CLOSE)
        np.testing.assert_array_equal(cases.entries(cache), stored)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_scores_of_a_cache(layout):
    layer, rules = cases.make_kind("everything")
    x = cases.noise(B, T, cases.D)
    _, weights = reference.multi_head_attention(layer, x, x, causal=True, **rules)
    cache = cases.make_cache(layer, B, CAPACITY, layout)
    _, cache = decode(layer, x[:, :11], cache, [11])

    @cases.compiled
    def step(tokens, cache, index):
        return layer(
            tokens,
            tokens,
            cache=cache,
            cache_update_index=index,
            use_causal_mask=True,
            return_attention_scores=True,
        )

    output, scores, cache = step(x[:, 11:], cache, cases.int32(11))
    assert tuple(scores.shape) == (B, 6, 2, CAPACITY)
    np.testing.assert_allclose(
        cases.numpy(scores)[..., :T], weights[:, :, 11:], **CLOSE
    )
    np.testing.assert_array_equal(cases.numpy(scores)[..., T:], 0)


def test_without_causality_new_entries_see_each_other():
    """The default hides what lies past the fill, and nothing before it."""
    layer, _ = cases.make_kind("plain")
    x = cases.noise(B, T, cases.D)
    cache = cases.make_cache(layer, B, CAPACITY, "head_major")

    @cases.compiled
    def both(cache):
        _, cache = layer(x[:, :5], x[:, :5], cache=cache, cache_update_index=0)
        return layer(x[:, 5:], x[:, 5:], cache=cache, cache_update_index=5)

    output, _ = both(cache)
    expected, _ = reference.multi_head_attention(layer, x, x)
    np.testing.assert_allclose(cases.numpy(output), expected[:, 5:], **CLOSE)


def test_value_dim_apart_from_key_dim():
    layer = cases.make_layer(6, 7, value_dim=5, num_key_value_heads=2, output_shape=19)
    x = cases.noise(B, T, cases.D)
    expected, _ = reference.multi_head_attention(layer, x, x, causal=True)
    assert expected.shape == (B, T, 19)
    output = cases.compiled(lambda x: layer(x, x, use_causal_mask=True))(x)
    np.testing.assert_allclose(cases.numpy(output), expected, **CLOSE)
    cache = cases.make_cache(layer, B, CAPACITY, "head_major")
    output, _ = decode(layer, x, cache, [11, 1, 1])
    np.testing.assert_allclose(output, expected, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(use_bias=False),
        dict(use_gate=True),
        dict(sliding_window=3),
        dict(output_shape=19),
        dict(dropout=0.3),
    ],
    ids=str,
)
def test_keras_layer_with_the_same_weights(options):
    """Without a cache the layer is Keras' own; weights go both ways."""
    ours = cases.make_layer(**options)
    theirs = keras.layers.MultiHeadAttention(3, 7, **options)
    theirs.build((None, None, cases.D), (None, None, cases.D))
    names = [
        [w.path.split("/", 1)[1] for w in layer.weights] for layer in (ours, theirs)
    ]
    assert names[0] == names[1]
    theirs.set_weights(ours.get_weights())
    query, value = cases.noise(B, T, cases.D), cases.noise(B, T, cases.D, seed=1)
    mask = cases.noise(B, T, T, seed=2) > -0.5
    # A query with nothing to attend gets zeros here, the mean of all in Keras.
    mask |= np.eye(T, dtype=bool)

    def call(layer):
        # Compiled, the weights would be constants of the program.
        rules = dict(attention_mask=mask, use_causal_mask=True)
        return layer(query, value), layer(
            query, value, return_attention_scores=True, **rules
        )

    for weights in (ours.get_weights(), [w / 2 for w in ours.get_weights()]):
        ours.set_weights(weights)
        theirs.set_weights(ours.get_weights())
        got, expected = call(ours), call(theirs)
        np.testing.assert_allclose(
            cases.numpy(got[0]), cases.numpy(expected[0]), **CLOSE
        )
        for ours_given, theirs_given in zip(got[1], expected[1], strict=True):
            np.testing.assert_allclose(
                cases.numpy(ours_given), cases.numpy(theirs_given), **CLOSE
            )
        theirs.set_weights([w + 1 for w in weights])
        ours.set_weights(theirs.get_weights())
        for left, right in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_array_equal(cases.numpy(left), cases.numpy(right))
