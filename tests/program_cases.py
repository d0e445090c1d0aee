"""What the tests of programs for machines that aren't there share."""

import contextlib
import re

import jax
import numpy as np

from keras_kvcache import samplers
from keras_kvcache.generation.steps import DecodeState, Limits

RESULT = re.compile(r" = (.+?[\])}]) ([a-z][\w-]*)\(")
ARRAY = re.compile(r"(bf16|f16|f32|s8)\[([\d,]+)\]")
# What writes nothing, or only some slots.
IN_PLACE = """parameter tuple get-tuple-element while bitcast
    dynamic-update-slice scatter""".split()
WIDTHS = {"bf16": 2, "f16": 2, "f32": 4, "s8": 1}


def compile_for(device, program, **arguments):
    """A jitted function, compiled for where `device`, a sharding, puts arrays."""

    def describe(leaf):
        if not hasattr(leaf, "shape"):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    with lowering_for(device):
        return program.lower(**jax.tree.map(describe, arguments)).compile()


def lowering_for(device):
    """Tells Pallas that it lowers for the GPU `device`; else it looks for one here."""
    (target,) = device.device_set
    is_gpu = target.platform == "gpu"
    return jax.default_device(target) if is_gpu else contextlib.nullcontext()


def compile_decode(device, lm, cache, rows):
    """The loop that decodes greedily, all rows with an end of their own."""
    rows = np.zeros(rows, "int32")
    return compile_for(
        device,
        lm.generator._decode,
        state=DecodeState(cache, rows, rows + 5, rows > 0, np.int32(1)),
        limits=Limits(rows + 100, np.full(8, -1, "int32")),
        seed=np.uint32(1),
        steps=np.int32(64),
        sampler=samplers.greedy(),
        channel=None,
    )


def written(text):
    """The instructions whose results go to memory, a line each: not within fusions."""
    fused = set(re.findall(r"calls=(%[\w.-]+)", text))
    for computation in re.split(r"\n(?=\S)", text):
        is_fused = computation.split(" ", 1)[0] in fused
        for line in computation.splitlines():
            if not is_fused or " ROOT " in line:
                yield line


def written_arrays(text):
    """Shape, dtype's name, operation and line of each such result."""
    for line in written(text):
        result = RESULT.search(line)
        if not result:
            continue
        arrays, operation = result.groups()
        for dtype, shape in ARRAY.findall(arrays):
            yield tuple(map(int, shape.split(","))), dtype, operation, line
