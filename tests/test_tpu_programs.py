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
from program_cases import (
    IN_PLACE,
    WIDTHS,
    compile_for,
    written_arrays,
)

from keras_kvcache.caches.segmentation import segment_sizes

pytestmark = [
    pytest.mark.jax_only,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="XLA compiles for TPUs by libtpu",
    ),
]

S = 8209
LAYERS = 3
FETCHES = ["copy-start", "copy-done"]


@pytest.fixture(scope="module")
def tpu():
    """Where arrays are of a program that is compiled for one."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compile_decode(tpu, rows, heads, head_dim):
    """The compiled loop, and the bytes of its caches."""
    lm = make_lm(
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_sequence_length=S,
        dtype="bfloat16",
    )
    cache = lm.generator.init_cache(rows, S)
    return compile_for(tpu, lm, cache), sum(layer.nbytes for layer in cache)


def wide_results(program, rows, heads, head_dim):
    """Operations and lines that write all slots of a segment."""
    segments = segment_sizes(S, False)[1:-1]
    for shape, dtype, operation, line in written_arrays(program.as_text()):
        slots = max(shape)
        wide = rows * heads * slots * head_dim * 2
        if slots in segments and math.prod(shape) * WIDTHS[dtype] >= wide:
            yield operation, line


def has_all_writes(operations):
    """Whether keys and values of every segment are written by slices in place."""
    wanted = 2 * len(segment_sizes(S, False)[1:-1]) * LAYERS
    return operations.count("dynamic-update-slice") >= wanted


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize("rows, heads", [(1, 2), (1, 6), (11, 2), (11, 6)])
def test_rows_are_written_in_place(rows, heads, tpu):
    """Each to a slot of its own, with no pass over what is there nor another order."""
    program, nbytes = compile_decode(tpu, rows, heads, 128)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes
    # A TPU has room for some megabytes beside its processor, which count, too.
    assert memory.temp_size_in_bytes < 0.2 * nbytes + 2**24
    operations = []
    for operation, line in wide_results(program, rows, heads, 128):
        # What is read may be fetched beforehand, to memory of the processor's.
        is_fetch = operation in FETCHES and "S(1)" in line.split("copy-")[0]
        assert operation in IN_PLACE or is_fetch, line
        operations.append(operation)
    assert has_all_writes(operations)


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize("rows, heads", [(1, 2), (1, 6), (11, 2), (11, 6)])
def test_heads_of_64_are_written_by_slices(rows, heads, tpu):
    """Most releases of libtpu lay these out otherwise for reading, by copies beside."""
    program, nbytes = compile_decode(tpu, rows, heads, 64)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes
    assert memory.temp_size_in_bytes < 1.6 * nbytes + 2**24
    found = wide_results(program, rows, heads, 64)
    assert has_all_writes([operation for operation, _ in found])
