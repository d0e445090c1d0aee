"""What the tests share that look at compiled programs."""

import contextlib
import re

import jax
import numpy as np

from keras_kvcache.attention.kernels.decode_attention import NAME

SHAPED = re.compile(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(")
# What writes entries of a cache to another place.
COPIES = ("copy", "transpose", "concatenate", "broadcast", "slice", "gather", "convert")
RESULT = re.compile(r" = (.+?[\])}]) ([a-z][\w-]*)\(")
ARRAY = re.compile(r"(bf16|f16|f32|s8)\[([\d,]+)\]")
# What writes nothing, or only some slots.
IN_PLACE = """parameter tuple get-tuple-element while bitcast
    dynamic-update-slice scatter""".split()
WIDTHS = {"bf16": 2, "f16": 2, "f32": 4, "s8": 1}


def made(program, operations, at_least):
    """The operations and shapes of the arrays that a compiled program makes.

    Args:
        program: A `jax.stages.Compiled`.
        operations: Names of XLA's operations.
        at_least: The fewest elements of an array that is listed.
    """
    found = []
    for shape, operation in SHAPED.findall(program.as_text()):
        size = int(np.prod([int(axis) for axis in shape.split(",")]))
        if operation in operations and size >= at_least:
            found.append((operation, shape))
    return found


def count_attentions(program):
    """How often a lowered program computes attention: by the kernel, or a softmax."""
    text = program.as_text()
    return text.count(f"@{NAME}(") + text.count("stablehlo.exponential")


def compile_for(device, lm, cache, chunk=None):
    """The loop that decodes greedily, or the run of a chunk of prompts.

    Compiled for where `device`, a sharding, puts arrays.
    """
    with lowering_for(device):
        return lm.generator.lower(cache, chunk=chunk, sharding=device).compile()


def lowering_for(device):
    """Tells Pallas that it lowers for the GPU `device`; else it looks for one here."""
    (target,) = device.device_set
    is_gpu = target.platform == "gpu"
    return jax.default_device(target) if is_gpu else contextlib.nullcontext()


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
