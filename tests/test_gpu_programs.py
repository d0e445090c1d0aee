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
        importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
        reason="XLA compiles for GPUs by the plugin jax-cuda12-plugin",
    ),
]

S = 4099
LAYERS = 2
LARGE = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|transpose|concatenate|broadcast)\(")
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


def compile_decode_loop(lm, cache, batch_size, gpu):
    rows = np.zeros(batch_size, "int32")
    arguments = dict(
        state=DecodeState(cache, rows, rows + 5, rows > 0, np.int32(1)),
        limits=Limits(rows + 100, np.full(8, -1, "int32")),
        seed=np.uint32(1),
        steps=np.int32(64),
    )
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=gpu),
        arguments,
    )
    lowered = lm.generator._decode.lower(
        **arguments, sampler=samplers.greedy(), channel=None
    )
    return lowered.compile()


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("codec", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("layout", ["head_major", "dense"])
@pytest.mark.parametrize("batch_size, heads", [(1, 2), (1, 6), (3, 2), (3, 6)])
def test_decode_loop_attends_by_the_kernel(batch_size, heads, layout, codec, gpu):
    """It holds no copy of a cache, and nothing on which the device would wait."""
    lm = make_lm(
        num_layers=LAYERS,
        num_key_value_heads=heads,
        head_dim=38,
        max_sequence_length=S,
        dtype="bfloat16",
    )
    cache = lm.generator.init_cache(batch_size, S, layout=layout, codec=codec)
    program = compile_decode_loop(lm, cache, batch_size, gpu)
    text = program.as_text()
    assert text.count(KERNEL) == LAYERS
    assert " conditional(" not in text
    assert text.count(" while(") == 1
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= LAYERS * cache[0].nbytes
    assert memory.temp_size_in_bytes < 0.2 * cache[0].nbytes
    found = LARGE.findall(text)
    assert found, "there is always a small one"
    large = batch_size * heads * 256 * lm.head_dim
    sizes = [shape for shape, _ in found if np.prod(np.int64(shape.split(","))) > large]
    assert not sizes
