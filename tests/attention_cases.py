"""Layers, caches and inputs that the tests of attention share."""

import jax
import keras
import numpy as np

from keras_kvcache.caches import CacheSpec
from keras_kvcache.layers import CachedMultiHeadAttention, RotaryEmbedding

D = 11  # width of the inputs
GARBAGE = 1e30  # what slots hold that nobody wrote
LAYOUTS = ("dense", "head_major")


def stored(codecs):
    """Pairs of a codec and a layout that it has: codes lie head-major only."""
    return [
        (codec, layout)
        for codec in codecs
        for layout in LAYOUTS
        if layout == "head_major" or codec not in ("int8", "int4")
    ]


def noise(*shape, seed=0, dtype="float32"):
    """Reproducible normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def make_layer(num_heads=3, key_dim=7, width=D, value_width=None, **options):
    """A built layer with random weights, biases included.

    They are small enough for float32 to come within 1e-5 of float64.
    """
    # Random initializers take a second to compile on JAX.
    options = {"kernel_initializer": "zeros", **options}
    layer = CachedMultiHeadAttention(num_heads, key_dim, **options)
    layer.build((None, None, width), (None, None, value_width or width))
    for seed, weight in enumerate(layer.trainable_weights):
        weight.assign(0.3 * noise(*weight.shape, seed=100 + seed))
    return layer


def make_cache(layer, batch_size, capacity, layout, dtype="float32", filler=GARBAGE):
    """A cache for a layer, as a user would hand it in, full of garbage."""
    heads, key_dim, value_dim = (
        layer.num_key_value_heads,
        layer.key_dim,
        layer.value_dim,
    )

    def full(*shape):
        return keras.ops.convert_to_tensor(np.full(shape, filler, "float32"), dtype)

    if layout == "dense":
        return full(batch_size, 2, capacity, heads, key_dim)
    spec = CacheSpec(batch_size, capacity, heads, key_dim, value_dim, codec=dtype)

    def fill(array):
        # Narrow floats may be held as whole numbers of their bits.
        is_bits = keras.backend.standardize_dtype(array.dtype) == "int16"
        floats = full(*array.shape)
        return keras.ops.view(floats, "int16") if is_bits else floats

    return jax.tree_util.tree_map(fill, spec.allocate())


def entries(cache):
    """What a cache holds, as a NumPy array `(B, 2, S, K, H)`."""
    return numpy(cache if keras.ops.is_tensor(cache) else cache.to_dense())


def numpy(tensor):
    """A tensor as a float64 or integer NumPy array."""
    array = keras.ops.convert_to_numpy(tensor)
    return array.astype("float64") if array.dtype.kind not in "biu" else array


def compiled(function):
    """The function jitted on JAX, where eager control flow compiles every call."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    # Small sizes: what optimizing saves in running it costs in compiling.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def int32(value):
    """An index whose value a compiled program doesn't know."""
    return keras.ops.convert_to_tensor(value, dtype="int32")


def rotary_layer(**options):
    """A rotary layer with a small base, so that far positions differ much."""
    return RotaryEmbedding(max_wavelength=50.0, **options)


# Constructor arguments, and what they mean for the reference.
KINDS = {
    "plain": (dict(), dict()),
    "no_bias": (dict(use_bias=False), dict()),
    "grouped": (dict(num_heads=6, num_key_value_heads=2), dict()),
    "multi_query": (dict(num_heads=5, num_key_value_heads=1), dict()),
    "rotary": (
        dict(key_dim=14, rotary_embedding=rotary_layer),
        dict(rotary=dict(base=50.0)),
    ),
    "window": (dict(sliding_window=4), dict(window=4)),
    "soft_cap": (dict(logit_soft_cap=1.5), dict(soft_cap=1.5)),
    "gate": (dict(use_gate=True), dict()),
    "query_scale": (dict(query_scale=0.61), dict()),
    "everything": (
        dict(
            num_heads=6,
            num_key_value_heads=3,
            key_dim=14,
            rotary_embedding=lambda: rotary_layer(rotary_dim=10, scaling_factor=1.7),
            sliding_window=5,
            logit_soft_cap=2.5,
            use_gate=True,
            query_norm=lambda: keras.layers.RMSNormalization(name="query_norm"),
            key_norm=lambda: keras.layers.RMSNormalization(name="key_norm"),
            query_scale=0.7,
        ),
        dict(
            rotary=dict(base=50.0, rotary_dim=10, scaling=1.7), window=5, soft_cap=2.5
        ),
    ),
}


def make_kind(kind, **more):
    """A layer of one of `KINDS`, and the rules for the reference."""
    options, rules = KINDS[kind]
    options = {
        name: value() if callable(value) else value for name, value in options.items()
    }
    return make_layer(**{**options, **more}), dict(rules)
