"""Which way of attending reads a long cache fastest on this machine?

In a decode step every row has one query, which attends the filled part of its keys and
values. The candidates are this package's own two layouts, which read what is filled by
the platform's kernel, the first of them by XLA alone, a plain product with all slots,
and what JAX has for it: `jax.nn.dot_product_attention`
with lengths, by XLA and by cuDNN, and the decode attention among its Pallas kernels
for GPUs. The fastest belongs into `keras_kvcache.attention.kernels.decode_attention`,
where the package chooses.

One compiled call attends through several caches, one after the other, a few times
over. Together they take more than any processor's cache holds. The fill is traced.
On an accelerator several calls are timed together, as the first waits for the host.
`of memory's` is the share of what summing a large array reaches in the same rounds.

All candidates have the same queries, keys and values. One that this machine can't run
is left out, and a line says so. One that fails, or gives other numbers than the
products with all slots, has a row that says so, and the benchmark fails at its end.
"""

import abc
import dataclasses
import functools
import importlib.util
import sys
from typing import NamedTuple

import harness

import keras_kvcache  # noqa: F401  # isort: skip  # First: it chooses JAX.
import jax
import jax.numpy as jnp
import numpy as np

from keras_kvcache.attention import Scoring, attend, view_masks
from keras_kvcache.attention.codecs import AsGiven
from keras_kvcache.caches import StaticCache

STEPS = 4  # how often a call goes through all caches
# Calls timed together: on an accelerator the host runs ahead, as in real loops.
CALLS = 1 if jax.default_backend() == "cpu" else 16
MEMORY = "memory"


class Shape(NamedTuple):
    """Sizes of attention by their letters, and how many layers have a cache."""

    B: int
    N: int
    K: int
    H: int
    S: int
    layers: int


class Candidate(abc.ABC):
    """A way to attend; its `name` belongs to the class."""

    @classmethod
    def missing(cls):
        """What it takes that this machine hasn't got; empty if nothing."""
        return ""

    def store(self, tensor):
        """Whatever it reads of keys and values that came as `(B, 2, S, K, H)`."""
        return tensor[:, 0], tensor[:, 1]

    @abc.abstractmethod
    def attend(self, query, stored, fill):
        """`(B, N, H)` queries over the first `fill` slots."""


class HeadMajor(Candidate):
    name, layout = "keras-kvcache, head-major", "head_major"

    def store(self, tensor):
        return StaticCache.from_dense(tensor, self.layout)

    def view(self, stored, fill):
        return stored.view(fill[None])

    def attend(self, query, stored, fill):
        view = self.view(stored, fill)
        masks = view_masks(view, fill[None, None] - 1)
        scale = query.shape[-1] ** -0.5
        return attend(query[:, None], view, masks, Scoring(scale))[:, 0]


class Dense(HeadMajor):
    name, layout = "keras-kvcache, dense", "dense"


class WithoutKernel(HeadMajor):
    name = "keras-kvcache, head-major, by XLA"

    def view(self, stored, fill):
        view = super().view(stored, fill)
        segments = (
            dataclasses.replace(segment, codec=AsGiven(segment.codec.dtype))
            for segment in view.segments
        )
        return view._replace(segments=tuple(segments))


class AllSlots(Candidate):
    """Head-major keys and values in one buffer each, whatever is filled."""

    name = "products with all slots"

    def store(self, tensor):
        return tuple(jnp.transpose(x, (0, 2, 1, 3)) for x in super().store(tensor))

    def attend(self, query, stored, fill):
        keys, values = stored
        batch, heads, slots, size = keys.shape
        grouped = query.reshape(batch, heads, -1, size)
        product = functools.partial(jnp.einsum, preferred_element_type="float32")
        scores = product("bkgh,bksh->bkgs", grouped, keys) * size**-0.5
        seen = jnp.arange(slots) < fill
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        mixed = product("bkgs,bksh->bkgh", weights.astype(values.dtype), values)
        return mixed.reshape(query.shape)


class ByXla(Candidate):
    name, implementation = "jax.nn.dot_product_attention, XLA", "xla"

    def attend(self, query, stored, fill):
        lengths = jnp.full(query.shape[:1], fill, "int32")
        return jax.nn.dot_product_attention(
            query[:, None],
            *stored,
            key_value_seq_lengths=lengths,
            implementation=self.implementation,
        )[:, 0]


class ByCudnn(ByXla):
    name, implementation = "jax.nn.dot_product_attention, cuDNN", "cudnn"

    @classmethod
    def missing(cls):
        return "" if jax.default_backend() == "gpu" else "an NVIDIA GPU"


class ByPallas(Candidate):
    name = "JAX's Pallas kernel for GPUs"
    # JAX removes it after 0.12.
    module = "jax.experimental.pallas.ops.gpu.decode_attention"

    @classmethod
    def missing(cls):
        if jax.default_backend() != "gpu":
            return "a GPU"
        return (
            "" if importlib.util.find_spec(cls.module) else f"a JAX with {cls.module}"
        )

    def attend(self, query, stored, fill):
        attention = importlib.import_module(self.module)
        return attention.gqa(query, *stored, kv_seq_len=fill)


CANDIDATES = (HeadMajor, Dense, WithoutKernel, AllSlots, ByXla, ByCudnn, ByPallas)


def main():
    options = harness.read_arguments("Times attention over a long cache.")
    report = harness.Report("attention_kernels", options)
    on_cpu = jax.default_backend() == "cpu"
    if options.quick:
        shape, fills = Shape(B=2, N=6, K=2, H=16, S=512, layers=2), (256, 512)
    elif on_cpu:
        shape = Shape(B=1, N=32, K=8, H=128, S=8192, layers=8)
        fills = (256, 1024, 4096, 8192)
    else:
        shape = Shape(B=32, N=32, K=8, H=128, S=8192, layers=2)
        fills = (256, 1024, 4096, 8192)
    dtype = "float32" if on_cpu else "bfloat16"
    programs = make_programs(shape, dtype)
    read_memory = harness.MemoryReader(options.quick)
    count = len(programs)
    for fill in fills:
        measure(report, shape, dtype, fill, programs, read_memory)
    report.finish()
    if len(programs) < count:
        sys.exit("Some candidates failed, or gave other numbers: see their rows.")


def make_programs(shape, dtype):
    """A dictionary from names to functions of a fill; each gives the last output."""
    query = jax.random.normal(jax.random.key(0), (shape.B, shape.N, shape.H), dtype)
    programs = {}
    for kind in CANDIDATES:
        if missing := kind.missing():
            print(f"{kind.name} is left out: it takes {missing}")
            continue
        candidate = kind()
        stored = [candidate.store(noise(shape, dtype, n)) for n in range(shape.layers)]
        program = functools.partial(jax.jit(functools.partial(run, candidate)), query)
        programs[kind.name] = functools.partial(program, stored)
    return programs


def noise(shape, dtype, seed):
    """Keys and values `(B, 2, S, K, H)`."""
    size = (shape.B, 2, shape.S, shape.K, shape.H)
    return jax.random.normal(jax.random.key(1 + seed), size, dtype)


def run(candidate, query, stored, fill):
    """Attends through all caches, each query a little other for what came before."""

    def step(_, mixed):
        for cache in stored:
            mixed = candidate.attend(query + mixed.astype(query.dtype), cache, fill)
            mixed = mixed.astype("float32")
        return mixed

    return jax.lax.fori_loop(0, STEPS, step, jnp.zeros(query.shape, "float32"))


def measure(report, shape, dtype, fill, programs, read_memory):
    """Adds a row for each candidate; takes those that fail out of `programs`."""
    fill = np.int32(fill)
    tolerance = 1e-4 if dtype == "float32" else 0.03
    drop_failures(report, programs, fill, tolerance)
    functions = {
        name: functools.partial(call, program, fill)
        for name, program in programs.items()
    }
    medians = harness.median_seconds({**functions, MEMORY: read_memory}, 5)
    bandwidth = read_memory.nbytes / medians.pop(MEMORY)
    nbytes = 2 * shape.B * int(fill) * shape.K * shape.H * jnp.dtype(dtype).itemsize
    for name, seconds in medians.items():
        once = seconds / CALLS / STEPS / shape.layers
        row = dict(shape._asdict(), candidate=name, fill=int(fill))
        row["ms"] = 1e3 * once
        row["GB/s"] = nbytes / once / 1e9
        row["of memory's"] = nbytes / once / bandwidth
        report.add(**row)


def call(program, fill):
    """Calls a program a few times; returns when all is done."""
    outputs = [program(fill) for _ in range(CALLS)]
    jax.block_until_ready(outputs)


def drop_failures(report, programs, fill, tolerance):
    """Takes out what fails, or differs from plain products, with a row that says so."""
    expected = np.asarray(programs[AllSlots.name](fill))
    for name, program in list(programs.items()):
        try:
            difference = np.std(np.asarray(program(fill)) - expected)
            difference = float(difference / np.std(expected))
            failed = (
                "" if difference < tolerance else f"differs by {difference:.1e} of 1"
            )
        except Exception as error:  # The others are still worth timing.
            failed = f"{type(error).__name__}: {error}"[:300]
        if failed:
            report.add(candidate=name, fill=int(fill), failed=failed)
            del programs[name]


if __name__ == "__main__":
    main()
