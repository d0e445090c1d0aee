"""Are cached attention and a model's logits the same numbers on this machine?

Attention through every kind, codec and layout of cache, for one query a row and for
several, in the dtype of this machine's models, bfloat16 on an accelerator: by the
platform's kernel where it takes them, and by XLA alone. Both are held against NumPy in
float64, whose keys and values are the same numbers, not coded. A model's logits in
bfloat16, through caches, are held against those of the same weights in float32 without
a cache.

`error` is the norm of the difference over that of what is expected. It includes what a
codec rounds. The benchmark fails if one is too large, or if a GPU for which there is a
kernel attends without it.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import harness

import keras_kvcache  # isort: skip  # First: it chooses JAX.
import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_kvcache.attention import Scoring, attend, view_masks
from keras_kvcache.caches import CacheSpec, Rolling
from keras_kvcache.runtime.platform import has_triton

CODES = ("int8", "int4")  # which have no dense layout
CODECS = ("float32", "bfloat16", "float16", *CODES)
LAYOUTS = ("head_major", "dense")
# Of attention in bfloat16, whose rounding alone is half a hundredth at most.
MOST = dict(float32=0.01, bfloat16=0.01, float16=0.01, int8=0.02, int4=0.2)
MOST_OF_LOGITS = dict(float32=0.05, bfloat16=0.05, float16=0.05, int8=0.06, int4=0.6)
KERNELS = ("decode_attention", "keras_kvcache_decode_attention")


def main():
    options = harness.read_arguments("Compares attention and logits with float32.")
    report = harness.Report("parity", options)
    failures = attention_rows(report, options.quick)
    failures += logits_rows(report, options.quick)
    report.finish()
    if failures:
        sys.exit("Not what they should be:\n" + "\n".join(failures))


def attention_rows(report, quick):
    """Adds a row for each way to attend; returns a list of what is wrong."""
    rows, heads, group, head_dim = (2, 2, 3, 64) if quick else (3, 4, 4, 128)
    filled, capacity, window = (301, 331, 97) if quick else (2903, 4099, 1021)
    generator = np.random.default_rng(0)
    size = (rows, filled, heads, head_dim)
    # Rounded to bfloat16 for the caches and NumPy alike.
    key, value = (
        jnp.asarray(generator.normal(size=size), "bfloat16") for _ in range(2)
    )
    kinds = {"static": "static", "rolling": Rolling(window, sinks=3)}
    cases = []
    for kind, codec, layout in itertools.product(kinds, CODECS, LAYOUTS):
        if layout == "dense" and codec in CODES:
            continue
        if quick and layout == "dense" and (kind, codec) != ("static", "bfloat16"):
            continue  # Each takes a CPU a second or two to compile.
        spec = CacheSpec(
            rows,
            capacity,
            heads,
            head_dim,
            codec=codec,
            layout=layout,
            kind=kinds[kind],
        )
        # A ring holds all that a window of one query needs; several need more.
        for length in (1, 31) if kind == "static" else (1,):
            query = generator.normal(size=(rows, length, heads * group, head_dim))
            query = jnp.asarray(query, "bfloat16")
            row = dict(what="attention", kind=kind, codec=codec, layout=layout)
            row |= dict(queries=length)
            expected = expect(query, key, value, kinds[kind])
            for by_kernel in (True, False):
                attend = jax.jit(functools.partial(cached_attention, by_kernel))
                first = np.zeros(rows, "int32")
                arguments = spec.allocate(), query, key, value, first
                cases.append(
                    Case(row, attend, arguments, expected, MOST[codec], by_kernel)
                )
    return compare(report, cases)


class Case(NamedTuple):
    """A jitted function and what it must give, within a relative error."""

    row: dict
    function: Callable
    arguments: tuple
    expected: np.ndarray
    most: float
    may_take_kernel: bool


def compare(report, cases):
    """Adds a row for each case, whether it works or not; returns what is wrong."""
    failures, waiting = [], collections.deque()
    # On a CPU optimizing costs more than it saves in running once.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None

    def take_first():
        case, program, has_kernel = waiting.popleft()
        try:
            failures.extend(compare_one(report, case, program.result(), has_kernel))
        except Exception as error:  # The others are still worth comparing.
            failed = f"{type(error).__name__}: {error}"[:300]
            report.add(**case.row, failed=failed)
            failures.append(f"{case.row}: {failed}")

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        has_kernel = True
        for case in cases:
            if not case.may_take_kernel and not has_kernel:
                continue  # XLA alone attended already.
            program, has_kernel = concurrent.futures.Future(), False
            try:
                lowered = case.function.lower(*case.arguments)
                has_kernel = any(name in lowered.as_text() for name in KERNELS)
                program = pool.submit(lowered.compile, compiler_options=options)
            except Exception as error:
                program.set_exception(error)
            waiting.append((case, program, has_kernel))
            while waiting and waiting[0][1].done():
                take_first()
        while waiting:
            take_first()
    return failures


def compare_one(report, case, program, has_kernel):
    """Adds the row of a compiled case; returns a list of what is wrong with it."""
    output = np.asarray(program(*case.arguments), "float64")
    error = np.linalg.norm(output - case.expected) / np.linalg.norm(case.expected)
    by = "kernel" if has_kernel else "XLA"
    report.add(**case.row, by=by, error=float(error), most=case.most)
    if not error < case.most:
        return [f"{case.row} by {by}: error {error:.3g}, at most {case.most}"]
    # XLA attends what is coded in groups.
    should = case.may_take_kernel and has_triton() and case.row["codec"] != "int4"
    if should and not has_kernel:
        return [f"{case.row}: there is a kernel, but XLA attends"]
    return []


def cached_attention(by_kernel, cache, query, key, value, first):
    """The last queries over a cache that keys and values were written to."""
    filled, length = key.shape[1], query.shape[1]
    cache, _ = cache.update(key[:, :-length], value[:, :-length], first)
    index = first + (filled - length)
    _, view = cache.update(key[:, -length:], value[:, -length:], index)
    if not by_kernel:
        segments = (
            dataclasses.replace(segment, codec=unread(segment.codec))
            for segment in view.segments
        )
        view = view._replace(segments=tuple(segments))
    positions = index[:, None] + jnp.arange(length)
    masks = view_masks(view, positions, causal=True)
    return attend(query, view, masks, Scoring(query.shape[-1] ** -0.5))


def unread(codec):
    """The same codec, but one that kernels don't read."""
    kind = type("Unread", (type(codec),), {"kernels_read": False})
    return kind(codec.dtype)


def expect(query, key, value, kind):
    """Causal attention of the last queries in NumPy and float64."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    rows, length, heads, head_dim = query.shape
    filled, kv_heads = key.shape[1:3]
    grouped = query.reshape(rows, length, kv_heads, -1, head_dim)
    scores = np.einsum("btkgh,bskh->btkgs", grouped, key) * head_dim**-0.5
    positions = filled - length + np.arange(length)[:, None]
    slots = np.arange(filled)
    seen = slots <= positions
    if isinstance(kind, Rolling):
        seen &= (slots > positions - kind.window) | (slots < kind.sinks)
    scores = np.where(seen[None, :, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("btkgs,bskh->btkgh", weights, value).reshape(query.shape)


def logits_rows(report, quick):
    """Adds a row for each cache of a model; returns a list of what is wrong."""
    sizes = dict(
        vocabulary_size=211 if quick else 4099,
        num_layers=2 if quick else 4,
        num_query_heads=6 if quick else 16,
        num_key_value_heads=2 if quick else 4,
        hidden_dim=96 if quick else 1024,
        intermediate_dim=128 if quick else 2816,
        max_sequence_length=2048,
    )
    keras.utils.set_random_seed(0)
    exact = keras_kvcache.DecoderLM(**sizes, dtype="float32")
    exact.set_weights([jnp.asarray(w, "bfloat16") for w in exact.get_weights()])
    narrow = keras_kvcache.DecoderLM(**sizes, dtype="bfloat16")
    narrow.set_weights([np.asarray(w, "float32") for w in exact.get_weights()])
    rng = np.random.default_rng(0)
    prompt, more = (37, 5) if quick else (509, 17)
    ids = rng.integers(0, exact.vocabulary_size, (2, prompt + more)).astype("int32")
    # A GPU or TPU would round the factors of float32 products, too.
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(pure(exact))(weights_of(exact), ids), "float64")
    cases = []
    for codec, layout in itertools.product(CODECS, LAYOUTS[: 1 if quick else None]):
        if layout == "dense" and codec in CODES:
            continue
        row = dict(what="logits", kind="static", codec=codec, layout=layout)
        decode = functools.partial(logits_through_cache, narrow, codec, layout, prompt)
        arguments = weights_of(narrow), ids
        of_prompt = expected[:, prompt - 1 :]
        most = MOST_OF_LOGITS[codec]
        cases.append(Case(row, jax.jit(decode), arguments, of_prompt, most, True))
    return compare(report, cases)


def weights_of(lm):
    return [variable.value for variable in lm.variables]


def stateless(lm, weights, function):
    """Calls the function while the model has these weights."""
    with keras.StatelessScope(
        state_mapping=list(zip(lm.variables, weights, strict=True))
    ):
        return function()


def pure(lm):
    return lambda weights, ids: stateless(lm, weights, lambda: lm(ids))


def logits_through_cache(lm, codec, layout, prompt, weights, ids):
    """Logits `(B, more + 1, V)` of the prompt's last token and of each one after."""

    def run():
        caches = lm.init_cache(len(ids), ids.shape[1], codec=codec, layout=layout)
        logits, _, caches = lm.call_with_cache(ids[:, :prompt], caches, 0)

        def step(caches, index):
            token = jax.lax.dynamic_slice_in_dim(ids, index, 1, axis=1)
            logits, _, caches = lm.call_with_cache(token, caches, index)
            return caches, logits[:, 0]

        indices = jnp.arange(prompt, ids.shape[1])
        _, others = jax.lax.scan(step, caches, indices)
        return jnp.concatenate([logits[:, -1:], jnp.swapaxes(others, 0, 1)], axis=1)

    return stateless(lm, weights, run)


if __name__ == "__main__":
    main()
