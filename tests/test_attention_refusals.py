"""What the layer refuses, by name, rule and value."""

import attention_cases as cases
import keras
import numpy as np
import pytest

from keras_kvcache.caches import CacheSpec, Rolling, Static, StaticCache
from keras_kvcache.layers import CachedMultiHeadAttention, RotaryEmbedding

B, T, S = 3, 5, 17


def zeros(*shape, dtype="float32"):
    return keras.ops.zeros(shape, dtype)


CONSTRUCTORS = [
    (dict(num_key_value_heads=4), ("num_key_value_heads=4", "num_heads=6")),
    (dict(num_key_value_heads=0), ("num_key_value_heads=0",)),
    (dict(num_key_value_heads=2.0), ("num_key_value_heads=2.0",)),
    (dict(num_key_value_heads=True), ("num_key_value_heads=True",)),
    (dict(sliding_window=0), ("sliding_window=0",)),
    (dict(sliding_window=-3), ("sliding_window=-3",)),
    (dict(logit_soft_cap=0.0), ("logit_soft_cap", "0.0")),
    (dict(logit_soft_cap="50"), ("logit_soft_cap", "'50'")),
    (dict(query_scale=-0.5), ("query_scale", "-0.5")),
    (dict(num_heads=0), ("num_heads=0",)),
    (dict(flash_attention=True, logit_soft_cap=3.0), ("flash_attention", "3.0")),
    (dict(flash_attention=True, dropout=0.1), ("flash attention",)),
]


@pytest.mark.parametrize("options, words", CONSTRUCTORS, ids=str)
def test_constructor(options, words):
    with pytest.raises(ValueError) as caught:
        CachedMultiHeadAttention(**{"num_heads": 6, "key_dim": 7, **options})
    for word in words:
        assert word in str(caught.value)


# Call arguments that replace good ones, the error, and what its message holds.
CALLS = {
    "rank": (
        dict(cache=(B, 2, S, 7)),
        ValueError,
        ["`cache`", "5 axes", "(3, 2, 17, 7)"],
    ),
    "halves": (dict(cache=(B, 3, S, 2, 7)), ValueError, ["`cache`", "= 2", "3"]),
    "batch": (dict(cache=(4, 2, S, 2, 7)), ValueError, ["batch size B = 3", "4"]),
    "heads": (dict(cache=(B, 2, S, 6, 7)), ValueError, ["heads K = 2", "6"]),
    "size": (dict(cache=(B, 2, S, 2, 11)), ValueError, ["head size H = 7", "11"]),
    "index_shape": (
        dict(index=np.zeros(2, "int32")),
        ValueError,
        ["`cache_update_index`", "(B,) = (3,)", "(2,)"],
    ),
    "index_rank": (
        dict(index=np.zeros((B, 1), "int32")),
        ValueError,
        ["`cache_update_index`", "(3, 1)"],
    ),
    "index_float": (
        dict(index=1.0),
        TypeError,
        ["`cache_update_index`", "1.0", "float"],
    ),
    "index_bool": (
        dict(index=True),
        TypeError,
        ["`cache_update_index`", "True", "bool"],
    ),
    "index_float_tensor": (
        dict(index=np.zeros(B, "float32")),
        TypeError,
        ["`cache_update_index`", "float32"],
    ),
    "index_bool_tensor": (
        dict(index=np.zeros(B, "bool")),
        TypeError,
        ["`cache_update_index`", "bool"],
    ),
    "index_end": (dict(index=13), ValueError, ["index=13", "T=5", "S=17"]),
    "index_negative": (dict(index=-1), ValueError, ["index=-1", "T=5", "S=17"]),
    "mask_slots": (
        dict(attention_mask=np.ones((T, T))),
        ValueError,
        ["`attention_mask`", "(3, 6, 5, 17)", "(5, 5)"],
    ),
    "mask_batch": (
        dict(attention_mask=np.ones((2, T, S))),
        ValueError,
        ["`attention_mask`", "(2, 5, 17)"],
    ),
    "mask_heads": (
        dict(attention_mask=np.ones((B, 2, T, S))),
        ValueError,
        ["`attention_mask`", "(3, 2, 5, 17)"],
    ),
    "mask_rank": (
        dict(attention_mask=np.ones(S)),
        ValueError,
        ["`attention_mask`", "(17,)"],
    ),
    "query_mask": (
        dict(query_mask=np.ones((B, 4), bool)),
        ValueError,
        ["`query_mask`", "(3, 5)", "(3, 4)"],
    ),
    "value_mask": (
        dict(value_mask=np.ones(B, bool)),
        ValueError,
        ["`value_mask`", "(3, 5)", "(3,)"],
    ),
    "key_length": (
        dict(key=np.ones((B, 4, cases.D), "float32")),
        ValueError,
        ["key.shape=(3, 4, 11)"],
    ),
    "value_batch": (
        dict(value=np.ones((2, T, cases.D), "float32")),
        ValueError,
        ["value.shape=(2, 5, 11)"],
    ),
    "value_none": (dict(value=None), ValueError, ["`value`", "None"]),
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("case", CALLS)
def test_call(case, symbolic):
    changed, error, words = CALLS[case]
    changed = dict(changed)
    layer = cases.make_layer(6, 7, num_key_value_heads=2)
    x = zeros(B, T, cases.D)
    cache = zeros(*changed.pop("cache", (B, 2, S, 2, 7)))
    if symbolic:
        x = keras.KerasTensor(x.shape)
        cache = keras.KerasTensor(cache.shape)
    call = dict(value=x, cache=cache, cache_update_index=changed.pop("index", 0))
    call.update(changed)
    with pytest.raises(error) as caught:
        layer(x, **call)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("cache", [[1, 2], "cache", 5, {"keys": 1}], ids=str)
def test_cache_of_another_type(cache):
    layer = cases.make_layer()
    x = zeros(B, T, cases.D)
    with pytest.raises(TypeError, match="`cache` must be a tensor"):
        layer(x, x, cache=cache, cache_update_index=0)


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_cache_that_holds_no_floats(layout, dtype):
    layer = cases.make_layer()
    x = zeros(B, T, cases.D)
    cache = zeros(B, 2, S, 3, 7, dtype=dtype)
    with pytest.raises(TypeError, match=f"must hold floats.*{dtype}"):
        if layout == "head_major":
            StaticCache.from_dense(cache)
        layer(x, x, cache=cache, cache_update_index=0)


@pytest.mark.parametrize("kind", [Static(), Rolling(5)], ids=str)
@pytest.mark.parametrize("codec, layout", cases.stored(["float32", "int8", "int4"]))
@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(batch_size=4), ["batch size B = 3", "4"]),
        (dict(num_key_value_heads=2), ["heads K = 3", "2"]),
        (dict(head_dim=5, value_dim=7), ["key head size H = 7", "5"]),
        (dict(value_dim=5), ["value head size = 7", "5"]),
    ],
    ids=str,
)
def test_cache_object_that_does_not_fit(kind, codec, layout, changed, words):
    layer = cases.make_layer()
    x = zeros(B, T, cases.D)
    sizes = dict(batch_size=B, num_key_value_heads=3, head_dim=7)
    options = dict(capacity=S, codec=codec, layout=layout, kind=kind)
    cache = CacheSpec(**{**sizes, **changed}, **options).allocate()
    with pytest.raises(ValueError) as caught:
        layer(x, x, cache=cache, cache_update_index=0)
    for word in words:
        assert word in str(caught.value)


def test_index_without_cache():
    layer = cases.make_layer()
    x = zeros(B, T, cases.D)
    with pytest.raises(ValueError, match="`cache_update_index` needs a `cache`"):
        layer(x, x, cache_update_index=0)


def test_dense_cache_with_two_head_sizes():
    layer = cases.make_layer(3, 7, value_dim=5)
    x = zeros(B, T, cases.D)
    with pytest.raises(ValueError, match="value head size = 5. Received: 7"):
        layer(x, x, cache=zeros(B, 2, S, 3, 7), cache_update_index=0)


def test_scores_of_flash_attention():
    layer = cases.make_layer(flash_attention=True)
    x = zeros(B, T, cases.D)
    with pytest.raises(ValueError, match="`return_attention_scores`.*flash"):
        layer(x, x, return_attention_scores=True)


@pytest.mark.parametrize(
    "axes, shape", [(2, (B, 4, T, cases.D)), (None, (B, 4, T, 11))]
)
def test_attention_over_other_axes_has_no_cache(axes, shape):
    x = zeros(*shape)
    for options, call, name in (
        ({}, dict(cache=zeros(B, 2, S, 3, 7), cache_update_index=0), "cache"),
        ({}, dict(cache_update_index=0), "cache_update_index"),
        (dict(num_key_value_heads=1), {}, "num_key_value_heads"),
        (dict(rotary_embedding=RotaryEmbedding()), {}, "rotary_embedding"),
        (dict(logit_soft_cap=2.0), {}, "logit_soft_cap"),
    ):
        layer = CachedMultiHeadAttention(3, 8, attention_axes=axes, **options)
        with pytest.raises(ValueError, match=f"`{name}` needs.*attended over axis 1"):
            layer(x, x, **call)


def test_reading_before_building():
    layer = CachedMultiHeadAttention(3, 7)
    with pytest.raises(ValueError, match="`value` may be `None` only in a layer that"):
        layer(zeros(B, T, cases.D), None, cache=zeros(B, 2, S, 3, 7))


def test_cache_object_in_a_functional_model():
    layer = cases.make_layer()
    x = keras.Input((T, cases.D), batch_size=B)
    cache = CacheSpec(B, S, 3, 7).allocate()
    with pytest.raises(TypeError, match="dense tensor in a functional model"):
        layer(x, x, cache=cache, cache_update_index=0)


@pytest.mark.parametrize(
    "options, size, words",
    [
        (dict(rotary_dim=5), None, ["`rotary_dim`", "5"]),
        (dict(rotary_dim=0), None, ["`rotary_dim`", "0"]),
        (dict(max_wavelength=0), None, ["`max_wavelength`", "0"]),
        (dict(scaling_factor=-1), None, ["`scaling_factor`", "-1"]),
        (dict(), 7, ["even", "rotary_dim=7"]),
        (dict(rotary_dim=10), 8, ["rotary_dim=10", "H=8"]),
        (dict(frequency_factors=[1, 2, 3]), 8, ["`frequency_factors`", "4", "3"]),
    ],
    ids=str,
)
def test_rotary(options, size, words):
    with pytest.raises(ValueError) as caught:
        RotaryEmbedding(**options).build((None, None, 3, size))
    for word in words:
        assert word in str(caught.value)
