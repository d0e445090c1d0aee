"""What XLA makes of decode for a TPU. It takes none, but XLA's library for them:

    pip install --no-deps libtpu
    JAX_PLATFORMS=cpu pytest tests/test_tpu_programs.py

in the version that `jax[tpu]` asks for. XLA compiles for a TPU v5e.
"""

import importlib.util
import math

import jax
import pytest
from conftest import make_lm
from program_cases import IN_PLACE, WIDTHS, compile_for, written_arrays

from keras_kvcache.caches.segmentation import segment_sizes

pytestmark = [
    pytest.mark.jax_only,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="XLA compiles for TPUs by libtpu",
    ),
]

S = 8209
FETCHES = ["copy-start", "copy-done"]


@pytest.fixture(scope="module")
def tpu():
    """Where arrays are of a program that is compiled for one."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize(
    "head_dim",
    [
        pytest.param(
            64,
            marks=pytest.mark.xfail(
                reason="most releases of libtpu turn slots of 64 numbers around before "
                "a loop, and back after it"
            ),
        ),
        128,
    ],
)
@pytest.mark.parametrize("rows, heads", [(1, 2), (1, 6), (11, 2), (11, 6)])
def test_rows_are_written_in_place(rows, heads, head_dim, tpu):
    """Each to a slot of its own, with no pass over what is there nor another order."""
    lm = make_lm(
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_sequence_length=S,
        dtype="bfloat16",
    )
    cache = lm.generator.init_cache(rows, S)
    program = compile_for(tpu, lm, cache)
    memory = program.memory_analysis()
    nbytes = sum(layer.nbytes for layer in cache)
    assert memory.alias_size_in_bytes >= nbytes
    # A TPU has room for some megabytes beside its processor, which count, too.
    assert memory.temp_size_in_bytes < 0.2 * nbytes + 2**24
    segments, writes = segment_sizes(S, False)[1:-1], 0
    for shape, dtype, operation, line in written_arrays(program.as_text()):
        slots = max(shape)
        wide = rows * heads * slots * head_dim * 2
        if slots in segments and math.prod(shape) * WIDTHS[dtype] >= wide:
            # What is read may be fetched beforehand, to memory of the processor's.
            is_fetch = operation in FETCHES and "S(1)" in line.split("copy-")[0]
            assert operation in IN_PLACE or is_fetch, line
            writes += operation == "dynamic-update-slice"
    assert writes >= 2 * len(segments) * len(cache)
