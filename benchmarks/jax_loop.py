"""The yardstick: greedy decoding of one row, written by hand in plain JAX.

No Keras, no options, one prompt: what remains when all that is general is taken
away. It reads the weights of a `DecoderLM` that is a Llama or a GPT-2. Its caches
are head-major segments of growing size, of which a step reads those that hold
something.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from keras_kvcache.runtime.platform import compiler_options

# With the vectors that the package's programs have.
jit = functools.partial(jax.jit, compiler_options=compiler_options())
product = functools.partial(jnp.einsum, preferred_element_type="float32")
# Where segments end, as the package cuts them.
SEGMENT_ENDS = (256, 1024, 2048, 4096, 8192)


class Shape(NamedTuple):
    """What is part of the program."""

    query_heads: int
    heads: int
    head_dim: int
    rotary: bool
    max_wavelength: float
    epsilon: float


class HandWritten:
    """Greedy decoding of one prompt.

    Args:
        lm: A `DecoderLM`, Llama-like or GPT-2-like, whose weights are read.
        capacity: Slots of the caches.
    """

    def __init__(self, lm, capacity):
        self._shape = Shape(
            lm.num_query_heads,
            lm.num_key_value_heads,
            lm.head_dim,
            lm.position_embedding == "rotary",
            lm.rope_max_wavelength,
            lm.layer_norm_epsilon,
        )
        self._weights = read_weights(lm)
        self._layers = lm.num_layers
        self._capacity = capacity

    def generate(self, prompt_ids, max_new_tokens):
        """The new ids, a list of `max_new_tokens`."""
        dtype = self._weights["embedding"].dtype
        cache = empty_cache(self._shape, self._layers, self._capacity, dtype)
        prompt = jnp.asarray(prompt_ids, jnp.int32)
        token, cache = prefill(self._shape, self._weights, prompt, cache)
        tokens, _ = decode(
            self._shape,
            self._weights,
            cache,
            token,
            len(prompt_ids),
            max_new_tokens,
            self._capacity,
        )
        return np.asarray(tokens)[:max_new_tokens].tolist()


def read_weights(lm):
    """The weights of a `DecoderLM`, projections as matrices."""

    def dense(layer, rows):
        kernel, *bias = (weight.value for weight in layer.weights)
        return [kernel.reshape(rows, -1), *(part.reshape(-1) for part in bias)]

    def values(layer):
        return [weight.value for weight in layer.weights]

    width = lm.hidden_dim
    blocks = []
    for block in lm.blocks:
        attention, forward = block.attention, block.feedforward
        block_weights = {
            "attention_norm": values(block.attention_norm),
            "query": dense(attention.query_dense, width),
            "key": dense(attention.key_dense, width),
            "value": dense(attention.value_dense, width),
            "output": dense(attention.output_dense, lm.num_query_heads * lm.head_dim),
            "forward_norm": values(block.feedforward_norm),
            "up": dense(forward.intermediate, width),
            "down": dense(forward.output_dense, lm.intermediate_dim),
        }
        if forward.gated:
            block_weights["gate"] = dense(forward.gate, width)
        blocks.append(block_weights)
    weights = {
        "embedding": lm.token_embedding.embeddings.value,
        "blocks": blocks,
        "final_norm": values(lm.final_norm),
    }
    if lm.position_embedding == "learned":
        weights["positions"] = lm.position_table.embeddings.value
    return weights


def empty_cache(shape, layers, capacity, dtype):
    """A list of layers, each a list of (keys (K, H, n), values (K, n, H))."""
    ends = [end for end in SEGMENT_ENDS if end < capacity] + [capacity]
    sizes = [end - first for first, end in zip([0, *ends], ends, strict=False)]
    heads, head_dim = shape.heads, shape.head_dim

    def segment(slots):
        keys, values = (heads, head_dim, slots), (heads, slots, head_dim)
        return jnp.zeros(keys, dtype), jnp.zeros(values, dtype)

    return [[segment(slots) for slots in sizes] for _ in range(layers)]


def normalize(shape, weights, x):
    if shape.rotary:
        square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(square + shape.epsilon) * weights[0]
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(x * x, axis=-1, keepdims=True) - mean * mean
    scale = jax.lax.rsqrt(variance + shape.epsilon) * weights[0]
    return (x - mean) * scale + weights[1]


def dense(weights, x):
    product = x @ weights[0]
    return product + weights[1] if len(weights) > 1 else product


def angles(shape, positions):
    exponent = jnp.arange(0, shape.head_dim, 2) / shape.head_dim
    angle = positions[:, None, None] * shape.max_wavelength**-exponent
    return jnp.cos(angle), jnp.sin(angle)


def turn(x, cos_sin):
    cos, sin = cos_sin
    first, second = jnp.split(x, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def write(segments, key, value, index):
    """Writes one token's key and value `(K, H)`; past a segment nothing changes."""
    written, first = [], 0
    for keys, values in segments:
        n = values.shape[1]
        slot = jnp.clip(index - first, 0, n - 1)
        here = slot == index - first
        old_key = jax.lax.dynamic_slice_in_dim(keys, slot, 1, 2)
        old_value = jax.lax.dynamic_slice_in_dim(values, slot, 1, 1)
        new_key = jnp.where(here, key[:, :, None], old_key)
        new_value = jnp.where(here, value[:, None], old_value)
        written.append(
            (
                jax.lax.dynamic_update_slice_in_dim(keys, new_key, slot, 2),
                jax.lax.dynamic_update_slice_in_dim(values, new_value, slot, 1),
            )
        )
        first += n
    return written


def attend(query, segments, index):
    """Query `(K, G, H)` over the segments that hold slots up to the index."""
    heads, group, head_dim = query.shape
    query = query * head_dim**-0.5
    running = (
        jnp.full((heads, group, 1), -1e30),
        jnp.zeros((heads, group, 1)),
        jnp.zeros((heads, group, head_dim)),
    )
    first = 0
    for keys, values in segments:

        def read(running, keys=keys, values=values, first=first):
            scores = product("kgh,khn->kgn", query, keys)
            seen = first + jnp.arange(values.shape[1]) <= index
            scores = jnp.where(seen, scores, -1e30)
            top, total, output = running
            maximum = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - maximum)
            shrink = jnp.exp(top - maximum)
            return (
                maximum,
                total * shrink + weights.sum(-1, keepdims=True),
                output * shrink
                + product("kgn,knh->kgh", weights.astype(values.dtype), values),
            )

        running = jax.lax.cond(index >= first, read, lambda running: running, running)
        first += values.shape[1]
    return (running[2] / running[1]).astype(query.dtype)


def block_step(shape, weights, x, cos_sin, attention):
    """One block; `attention` gets queries, keys, values `(T, heads, H)`."""
    normed = normalize(shape, weights["attention_norm"], x)
    heads = [
        dense(weights[name], normed).reshape(len(x), -1, shape.head_dim)
        for name in ("query", "key", "value")
    ]
    if shape.rotary:
        heads[:2] = (turn(part, cos_sin) for part in heads[:2])
    x = x + dense(weights["output"], attention(*heads).reshape(len(x), -1))
    normed = normalize(shape, weights["forward_norm"], x)
    inner = dense(weights["up"], normed)
    if "gate" in weights:
        inner = jax.nn.silu(dense(weights["gate"], normed)) * inner
    else:
        inner = jax.nn.gelu(inner)
    return x + dense(weights["down"], inner)


def embed(shape, weights, token_ids, positions):
    x = weights["embedding"][token_ids]
    if shape.rotary:
        return x, angles(shape, positions)
    return x + weights["positions"][positions], None


def likeliest(shape, weights, x):
    x = normalize(shape, weights["final_norm"], x)
    # A product with the transposed table would read it more slowly.
    logits = jnp.einsum("...d,vd->...v", x, weights["embedding"])
    return jnp.argmax(logits, axis=-1)


@functools.partial(jit, static_argnums=0, donate_argnums=3)
def prefill(shape, weights, prompt, cache):
    """The whole prompt at once: the first new token, and the filled cache."""
    length = len(prompt)
    x, cos_sin = embed(shape, weights, prompt, jnp.arange(length))
    filled = []
    for block, segments in zip(weights["blocks"], cache, strict=True):
        filled_layer = []

        def attention(query, key, value, segments=segments, filled=filled_layer):
            first = 0
            for keys, values in segments:
                part = slice(first, min(first + values.shape[1], length))
                if part.start < length:
                    keys = keys.at[:, :, : part.stop - first].set(
                        key[part].transpose(1, 2, 0)
                    )
                    values = values.at[:, : part.stop - first].set(
                        value[part].transpose(1, 0, 2)
                    )
                filled.append((keys, values))
                first += values.shape[1]
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)

        x = block_step(shape, block, x, cos_sin, attention)
        filled.append(filled_layer)
    return likeliest(shape, weights, x[-1:])[0].astype(jnp.int32), filled


@functools.partial(jit, static_argnums=(0, 6), donate_argnums=2)
def decode(shape, weights, cache, token, index, steps, capacity):
    """The tokens `(capacity,)`, `steps` of them new, and the cache."""

    def step(loop):
        count, token, cache, tokens = loop
        position = index + count - 1
        x, cos_sin = embed(shape, weights, token[None], position[None])
        written = []
        for block, segments in zip(weights["blocks"], cache, strict=True):

            def attention(query, key, value, segments=segments):
                segments = write(segments, key[0], value[0], position)
                written.append(segments)
                query = query.reshape(shape.heads, -1, shape.head_dim)
                return attend(query, segments, position)

            x = block_step(shape, block, x, cos_sin, attention)
        token = likeliest(shape, weights, x)[0].astype(jnp.int32)
        return count + 1, token, written, tokens.at[count].set(token)

    tokens = jnp.zeros(capacity, jnp.int32).at[0].set(token)
    loop = (jnp.int32(1), token, cache, tokens)
    loop = jax.lax.while_loop(lambda loop: loop[0] < steps, step, loop)
    return loop[3], loop[2]
