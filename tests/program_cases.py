"""What the tests of programs for machines that aren't there share."""

import contextlib
import re

import jax

RESULT = re.compile(r" = (.+?[\])}]) ([a-z][\w-]*)\(")
ARRAY = re.compile(r"(bf16|f16|f32|s8)\[([\d,]+)\]")
# What writes nothing, or only some slots.
IN_PLACE = """parameter tuple get-tuple-element while bitcast
    dynamic-update-slice scatter""".split()
WIDTHS = {"bf16": 2, "f16": 2, "f32": 4, "s8": 1}


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
