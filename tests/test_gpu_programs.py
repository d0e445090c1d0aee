"""What XLA makes of prefill and decode for a GPU. It takes none, but JAX's plugin:

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt
    JAX_PLATFORMS=cpu pytest tests/test_gpu_programs.py

both of JAX's own version, or the same for CUDA 12. XLA compiles for the H200 that
`data/h200.txtpb` describes, and the kernel for a GPU with less memory beside its
processors, too.
"""

import importlib.util
import math
import re
from pathlib import Path

import attention_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_lm
from program_cases import (
    IN_PLACE,
    WIDTHS,
    compile_for,
    lowering_for,
    written_arrays,
)

from keras_kvcache.attention import Scoring, Segment
from keras_kvcache.attention.codecs import Exact, Int8
from keras_kvcache.attention.kernels.triton_attention import attend_by_triton
from keras_kvcache.attention.segments import HEAD_MAJOR
from keras_kvcache.runtime.platform import has_triton

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")

pytestmark = [
    pytest.mark.jax_only,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, PLUGINS)),
        reason="XLA compiles for GPUs by the plugin jax-cuda13-plugin",
    ),
]

# What `triton_attention.py` says of Pallas is no matter for users.
quietly = pytest.mark.filterwarnings("error:.*Triton.* deprecated")

S = 4099
LAYERS = 2
SPLICES = re.compile(r"%\w*(dynamic_update_slice|scatter)_fusion")
KERNEL = re.compile(r'name = \\*"(decode_attention|merge_parts)')


def gpu_of(described):
    """Where arrays are of a program that is compiled for a GPU."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=described, topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


H200 = (Path(__file__).parent / "data" / "h200.txtpb").read_text()


@pytest.fixture(scope="module")
def gpu():
    if has_triton():
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return gpu_of(H200)


@pytest.fixture(scope="module")
def small_gpu():
    """Of Ampere, with 99 KB of shared memory for a program, as an A10 has."""
    changes = {
        "shared_memory_per_core: 233472": "shared_memory_per_core: 102400",
        "per_block_optin: 232448": "per_block_optin: 101376",
        "{ major: 9 }": "{ major: 8 minor: 6 }",
        "core_count: 132": "core_count: 72",
        "NVIDIA H200": "NVIDIA A10",
    }
    described = H200
    for old, new in changes.items():
        assert old in described
        described = described.replace(old, new)
    return gpu_of(described)


def make_model(heads):
    return make_lm(
        num_layers=LAYERS,
        num_key_value_heads=heads,
        head_dim=38,
        max_sequence_length=S,
        dtype="bfloat16",
    )


def check_program(program, cache):
    """It attends by the kernel, branches nowhere, and splices into caches in place."""
    text = program.as_text()
    kernels = ["decode_attention", "merge_parts"] * LAYERS
    assert KERNEL.findall(text) == kernels
    assert " conditional(" not in text
    assert program.memory_analysis().alias_size_in_bytes >= LAYERS * cache[0].nbytes
    wide = cache[0].nbytes / 3  # less than a layer's keys
    splices = 0
    for shape, dtype, operation, line in written_arrays(text):
        if S in shape and math.prod(shape) * WIDTHS[dtype] > wide:
            assert operation in IN_PLACE or SPLICES.search(line), line
            splices += operation not in ("parameter", "get-tuple-element")
    assert splices >= LAYERS, "there is at least one for each cache"
    return text


@quietly
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("codec, layout", cases.stored(["bfloat16", "float16", "int8"]))
@pytest.mark.parametrize("batch_size, heads", [(1, 2), (1, 6), (3, 2), (3, 6)])
def test_decode_loop(batch_size, heads, layout, codec, gpu):
    lm = make_model(heads)
    cache = lm.generator.init_cache(batch_size, S, layout=layout, codec=codec)
    program = compile_for(gpu, lm, cache)
    text = check_program(program, cache)
    assert text.count(" while(") == 1
    temporaries = program.memory_analysis().temp_size_in_bytes
    # Where XLA finds cuBLAS the faster, that has a workspace of some megabytes.
    workspaces = map(int, re.findall(r", s8\[(\d+)\]\S* custom-call\(", text))
    assert temporaries - max(workspaces, default=0) < 0.2 * cache[0].nbytes
    check_weights_are_read(text, lm)


def check_weights_are_read(text, lm):
    """By products: nothing as large as a layer's weights is written, nor a copy."""
    kernels = [w for w in lm.get_layer("block_0").weights if w.name == "kernel"]
    kernels.append(lm.token_embedding.embeddings)
    sizes = {math.prod(kernel.shape) for kernel in kernels}
    for shape, _, operation, line in written_arrays(text):
        assert operation in IN_PLACE or math.prod(shape) not in sizes, line


@quietly
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("layout", ["head_major", "dense"])
def test_prefill(layout, gpu):
    lm = make_model(heads=2)
    batch_size, chunk = 3, 512
    cache = lm.generator.init_cache(batch_size, S, layout=layout)
    program = compile_for(gpu, lm, cache, chunk)
    text = check_program(program, cache)
    assert " while(" not in text
    # There are no scores: nothing is as large as those of a layer's queries.
    scores = batch_size * lm.num_query_heads * chunk * S
    shapes = re.findall(r"= \w+\[([\d,]+)\]", text)
    assert max(np.prod(np.int64(shape.split(","))) for shape in shapes) < scores


@pytest.mark.parametrize(
    "query_dtype, dtype",
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "int8"),
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("float32", "int8"),
        ("float16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("length", [1, 31])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.filterwarnings("ignore:.*Triton.* deprecated")  # here it's lowered bare
def test_tiles_fit_small_gpus(head_dim, length, query_dtype, dtype, small_gpu):
    batch, heads, group, slots = 2, 3, 4, 2048

    def describe(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=small_gpu)

    arrays = [describe(batch, heads, head_dim, slots, dtype=dtype)]
    arrays += [describe(batch, heads, slots, head_dim, dtype=dtype)]
    if dtype == "int8":
        scales = (batch, heads, 1, slots), (batch, heads, slots, 1)
        arrays.insert(1, describe(*scales[0], dtype="float32"))
        arrays.append(describe(*scales[1], dtype="float32"))

    def attend(query, mask, *arrays):
        codec = Int8() if dtype == "int8" else Exact(dtype)
        positions = jax.numpy.arange(slots, dtype="int32")[None]
        segment = Segment(arrays, positions, HEAD_MAJOR, codec, head_dim, head_dim)
        return attend_by_triton(query, [segment], [mask], length, Scoring(1.0), None)

    query = describe(batch, heads, group * length, head_dim, dtype=query_dtype)
    mask = describe(batch, 1, length, slots, dtype="bool")
    with lowering_for(small_gpu):
        program = jax.jit(attend).lower(query, mask, *arrays).compile()
    assert KERNEL.search(program.as_text())
