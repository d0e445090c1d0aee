"""What XLA makes of the decode loop for a GPU. It takes no GPU, but JAX's plugin:

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt
    JAX_PLATFORMS=cpu pytest tests/test_gpu_programs.py

both of JAX's own version. XLA compiles for the H200 that `data/h200.txtpb` describes.
"""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_lm

from keras_kvcache import samplers
from keras_kvcache.generation.steps import DecodeState, Limits

pytestmark = [
    pytest.mark.jax_only,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="XLA compiles for GPUs by the plugin jax-cuda12-plugin",
    ),
]

S = 4099
LAYERS = 2
# Of what a cache may hold: not of the positions and booleans that masks are made of.
COPIED = re.compile(
    r"= (?:bf16|f32|s8)\[([\d,]+)\]\S* (?:copy|transpose|concatenate|broadcast)\("
)
KERNEL = 'custom_call_target="__gpu$xla.gpu.triton"'


@pytest.fixture(scope="module")
def gpu():
    """Where arrays are of a program that is compiled for the GPU."""
    from jax.experimental import topologies

    described = (Path(__file__).parent / "data" / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=described, topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def make_model(heads):
    return make_lm(
        num_layers=LAYERS,
        num_key_value_heads=heads,
        head_dim=38,
        max_sequence_length=S,
        dtype="bfloat16",
    )


def compile_for(gpu, program, **arguments):
    def describe(leaf):
        if not hasattr(leaf, "shape"):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=gpu)

    return program.lower(**jax.tree.map(describe, arguments)).compile()


def written(text):
    """The instructions whose results go to memory, a line each: not within fusions."""
    fused = set(re.findall(r"calls=(%[\w.-]+)", text))
    for computation in re.split(r"\n(?=\S)", text):
        is_fused = computation.split(" ", 1)[0] in fused
        for line in computation.splitlines():
            if not is_fused or " ROOT " in line:
                yield line


def check_program(program, cache):
    """It attends by the kernel, never waits for the device, and copies no cache."""
    text = program.as_text()
    assert text.count(KERNEL) == LAYERS
    assert " conditional(" not in text
    assert program.memory_analysis().alias_size_in_bytes >= LAYERS * cache[0].nbytes
    copies = COPIED.findall("\n".join(written(text)))
    sizes = [np.prod(np.int64(shape.split(","))) for shape in copies]
    assert max(sizes, default=0) < cache[0].nbytes / 10
    return text


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("codec", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("layout", ["head_major", "dense"])
@pytest.mark.parametrize("batch_size, heads", [(1, 2), (1, 6), (3, 2), (3, 6)])
def test_decode_loop(batch_size, heads, layout, codec, gpu):
    lm = make_model(heads)
    cache = lm.generator.init_cache(batch_size, S, layout=layout, codec=codec)
    rows = np.zeros(batch_size, "int32")
    program = compile_for(
        gpu,
        lm.generator._decode,
        state=DecodeState(cache, rows, rows + 5, rows > 0, np.int32(1)),
        limits=Limits(rows + 100, np.full(8, -1, "int32")),
        seed=np.uint32(1),
        steps=np.int32(64),
        sampler=samplers.greedy(),
        channel=None,
    )
    text = check_program(program, cache)
    assert text.count(" while(") == 1
    temporaries = program.memory_analysis().temp_size_in_bytes
    assert temporaries < 0.2 * cache[0].nbytes


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("layout", ["head_major", "dense"])
def test_prefill(layout, gpu):
    lm = make_model(heads=2)
    batch_size, chunk = 3, 512
    cache = lm.generator.init_cache(batch_size, S, layout=layout)
    rows = np.zeros(batch_size, "int32")
    program = compile_for(
        gpu,
        lm.generator._prefill,
        cache=cache,
        token=rows,
        token_ids=np.zeros((batch_size, chunk), "int32"),
        first=np.int32(0),
        lengths=rows + chunk,
        seed=np.zeros(2, "uint32"),
        sampler=samplers.greedy(),
    )
    text = check_program(program, cache)
    assert " while(" not in text
    # There are no scores: nothing is as large as those of a layer's queries.
    scores = batch_size * lm.num_query_heads * chunk * S
    shapes = re.findall(r"= \w+\[([\d,]+)\]", text)
    assert max(np.prod(np.int64(shape.split(","))) for shape in shapes) < scores
