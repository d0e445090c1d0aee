"""What does one decode step of the attention layer cost?

One compiled call decodes a few tokens as a model of nothing but attention would: each
token goes through one cache after the other, normalized before every layer, and a
layer's output is added. The layers share their weights, which are arguments of the
program; the caches are donated and returned. The index is traced, so one program serves
all fills. All programs, keras-hub's too, are compiled for the widest vectors. The time
of a call by tokens and caches is that of a step: projections, the write, and attention.

At the largest capacity the caches take 600 MB together (0.5 or 2 GB in bfloat16 on an
accelerator), so that full ones come from memory in every step. A small part of them,
and the weights, may well stay in the processor's own cache.

keras-hub's layer gets the mask that keras-hub's decoder makes for it, and no dropout,
so that it may take Keras' fused attention. It has no grouped heads: where `K < N` the
attention of keras-hub's Llama stands in for it, and ours rotates as well.

`GB/s` counts the filled part of a cache and not the weights; `of memory's` is its share
of what summing a large array reaches in the same rounds. All contenders have the same
weights, inputs and caches, and the benchmark stops unless their outputs agree.
"""

import functools
import importlib.util
from dataclasses import dataclass

import harness
import jax
import jax.numpy as jnp
import numpy as np

from keras_kvcache.caches import StaticCache
from keras_kvcache.layers import CachedMultiHeadAttention, RotaryEmbedding
from keras_kvcache.runtime.platform import compiler_options

STEPS = 4  # tokens that one call decodes
# Calls timed together: on an accelerator the host runs ahead, as in real loops.
CALLS = 1 if jax.default_backend() == "cpu" else 16
DENSE, HEAD_MAJOR = "keras-kvcache, dense", "keras-kvcache, head-major"
KERAS_HUB, MEMORY = "keras-hub", "memory"


@dataclass(frozen=True)
class Shape:
    """Sizes of attention by their letters, and how many layers have a cache."""

    B: int
    N: int
    K: int
    H: int
    layers: int

    @property
    def is_grouped(self):
        return self.K < self.N

    @property
    def inputs(self):
        return (self.B, 1, self.N * self.H)


# Of each shape the capacities, and of each capacity the fills.
GROWING = {256: (256,), 1024: (256,), 4096: (256,), 8192: (256, 1024, 4096, 8192)}
RUNS = {
    Shape(B=1, N=12, K=12, H=64, layers=12): GROWING,  # as GPT-2
    Shape(B=1, N=9, K=3, H=64, layers=48): GROWING,  # as SmolLM2
    Shape(B=8, N=9, K=3, H=64, layers=24): {2048: (256, 2048)},
}
# On an accelerator.
LARGE_RUNS = {
    Shape(B=32, N=32, K=8, H=128, layers=2): {256: (256,), 8192: (256, 1024, 8192)},
    Shape(B=1, N=32, K=8, H=128, layers=16): {8192: (256, 8192)},
}
QUICK_RUNS = {
    Shape(B=1, N=4, K=4, H=16, layers=2): {256: (256,), 512: (256, 512)},
    Shape(B=3, N=6, K=2, H=16, layers=2): {512: (512,)},
}


def main():
    options = harness.read_arguments("Times one decode step of attention alone.")
    report = harness.Report("attention_step", options)
    repeats = 3 if options.quick else 5
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    runs = QUICK_RUNS if options.quick else RUNS if on_cpu else LARGE_RUNS
    read_memory = harness.MemoryReader(options.quick)
    has_keras_hub = importlib.util.find_spec("keras_hub") is not None
    if not has_keras_hub:
        print("keras-hub is left out: no module keras_hub")

    def measure(shape, capacity, fill, contenders, per_row=False):
        fills = np.full(shape.B, fill) if per_row else fill
        check_agreement(contenders, fills, dtype)
        functions = {
            name: functools.partial(contender.decode, fills, CALLS)
            for name, contender in contenders.items()
        }
        medians = harness.median_seconds({**functions, MEMORY: read_memory}, repeats)
        bandwidth = read_memory.nbytes / medians.pop(MEMORY)
        filled = 2 * shape.B * fill * shape.K * shape.H * jnp.dtype(dtype).itemsize
        for name, seconds in medians.items():
            step = seconds / CALLS / STEPS / shape.layers
            row = dict(contender=name, B=shape.B, N=shape.N, K=shape.K, H=shape.H)
            row |= dict(capacity=capacity, fill=fill)
            row["index"] = "per row" if per_row else "shared"
            row["ms per step"] = 1e3 * step
            row["GB/s"] = filled / step / 1e9
            row["of memory's"] = filled / step / bandwidth
            if KERAS_HUB in medians:
                row["times keras-hub"] = medians[KERAS_HUB] / seconds
            report.add(**row)

    for shape, sizes in runs.items():
        for capacity, fills in sizes.items():
            contenders = make_contenders(shape, capacity, dtype, has_keras_hub)
            for fill in fills:
                measure(shape, capacity, fill, contenders)
            if shape.B > 1:
                contenders.pop(KERAS_HUB, None)  # It knows no index per row.
                measure(shape, capacity, fills[-1], contenders, per_row=True)
    report.finish()


class Contender:
    """An attention layer, the caches it steps through, and the program that does it.

    Args:
        layer: The layer, built.
        attend: `(layer, x, cache, index) -> (output, cache)`.
        caches: Caches, one a layer of the model.
        x: The first token, `(B, 1, D)`.
    """

    def __init__(self, layer, attend, caches, x):
        def program(weights, x, caches, index):
            def pure_layer(*args, **kwargs):
                return layer.stateless_call(weights, [], *args, **kwargs)[0]

            def decode(step, state):
                x, caches = state
                updated = []
                for cache in caches:
                    normed = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
                    output, cache = attend(pure_layer, normed, cache, index + step)
                    x = x + output
                    updated.append(cache)
                return x, updated

            return jax.lax.fori_loop(0, STEPS, decode, (x, caches))

        self._program = jax.jit(
            program, donate_argnames="caches", compiler_options=compiler_options()
        )
        self._weights = [variable.value for variable in layer.trainable_variables]
        self._caches, self._x = caches, x

    def decode(self, fill, calls=1):
        """Fills the caches up to `fill`, an int or one a row; the last output."""
        index = np.asarray(fill - STEPS, "int32")
        for _ in range(calls):
            x, self._caches = self._program(self._weights, self._x, self._caches, index)
        return jax.block_until_ready((x, self._caches))[0]


def make_contenders(shape, capacity, dtype, has_keras_hub):
    """A dictionary from names to `Contender`s that all compute the same."""
    kinds = {DENSE: make_layer(shape, dtype), HEAD_MAJOR: make_layer(shape, dtype)}
    if has_keras_hub:
        kinds[KERAS_HUB] = make_keras_hub_layer(shape, dtype)
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=shape.inputs), dtype)
    scale = shape.inputs[-1] ** -0.5
    weights = [
        generator.normal(scale=scale, size=weight.shape)
        for weight in kinds[DENSE][0].weights
    ]
    contenders = {}
    for name, (layer, attend) in kinds.items():
        layer.set_weights(weights)
        caches = make_caches(shape, capacity, dtype, head_major=name == HEAD_MAJOR)
        contenders[name] = Contender(layer, attend, caches, x)
    return contenders


def make_layer(shape, dtype):
    """Our attention of this shape, and how to call it."""
    layer = CachedMultiHeadAttention(
        shape.N,
        shape.H,
        num_key_value_heads=shape.K,
        rotary_embedding=RotaryEmbedding(dtype=dtype) if shape.is_grouped else None,
        use_bias=not shape.is_grouped,
        dtype=dtype,
    )
    layer.build(shape.inputs, shape.inputs)

    def attend(layer, x, cache, index):
        return layer(x, x, cache=cache, cache_update_index=index, use_causal_mask=True)

    return layer, attend


def make_keras_hub_layer(shape, dtype):
    """keras-hub's attention of this shape, and how to call it."""
    import keras_hub
    from keras_hub.src.layers.modeling import transformer_layer_utils
    from keras_hub.src.models.llama.llama_attention import LlamaAttention

    if shape.is_grouped:
        layer = LlamaAttention(shape.N, shape.K, dtype=dtype)
        layer.build(shape.inputs)
    else:
        layer = keras_hub.layers.CachedMultiHeadAttention(shape.N, shape.H, dtype=dtype)
        layer.build(shape.inputs, shape.inputs)

    def attend(layer, x, cache, index):
        mask = transformer_layer_utils.compute_causal_mask(
            shape.B, cache.shape[2], 1, index
        )
        return layer(
            *([x] if shape.is_grouped else [x, x]),
            attention_mask=mask,
            cache=cache,
            cache_update_index=index,
        )

    return layer, attend


def make_caches(shape, capacity, dtype, head_major):
    """Caches full of noise, one a layer."""
    size = (shape.B, 2, capacity, shape.K, shape.H)
    caches = []
    for layer in range(shape.layers):
        cache = jax.random.normal(jax.random.key(layer), size, dtype)
        caches.append(StaticCache.from_dense(cache) if head_major else cache)
    return caches


def check_agreement(contenders, fill, dtype):
    """Stops the benchmark unless all contenders compute the same."""
    expected = np.asarray(contenders[DENSE].decode(fill), "float32")
    tolerance = 1e-4 if dtype == "float32" else 0.03
    for name, contender in contenders.items():
        error = np.asarray(contender.decode(fill), "float32") - expected
        difference = np.std(error) / np.std(expected)
        if not difference < tolerance:
            raise SystemExit(f"{name} and {DENSE} differ by {difference:.1e} of 1.")


if __name__ == "__main__":
    main()
