"""Chunks and single tokens by traced blocks, where no decode loop is compiled."""

import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm
from keras import ops

from keras_kvcache.layers.block_programs import BlockPrograms, run_block
from keras_kvcache.ops import can_trace, trace

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CACHES = [
    {},
    {"layout": "dense"},
    {"codec": "int8"},
    {"codec": "int4"},
    {"codec": "bfloat16"},
]

traced_only = pytest.mark.skipif(not can_trace(), reason="JAX compiles by itself")


def decode(lm, run, options, lengths):
    """Hidden states and caches after a prompt and a token of each row."""
    cache = lm.init_cache(len(IDS), 67, **options)
    start = ops.zeros(len(IDS), "int32")
    hidden, cache = lm._run_with_cache(IDS, cache, start, run)
    states = [ops.convert_to_numpy(hidden)[:, -1:]]
    for step in range(3):
        token, index = IDS[:, step : step + 1], np.add(lengths, step).astype("int32")
        index = ops.convert_to_tensor(index)
        hidden, cache = lm._run_with_cache(token, cache, index, run)
        states.append(ops.convert_to_numpy(hidden))
    return states


@traced_only
@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_equals_the_blocks_as_they_are(lm, options, lengths):
    programs = BlockPrograms()
    ours = decode(lm, programs, options, lengths)
    expected = decode(lm, run_block, options, lengths)
    # A sum in another order may round an entry to the next bfloat16 number.
    atol = 5e-3 if options == {"codec": "bfloat16"} else 2e-4
    np.testing.assert_allclose(ours, expected, atol=atol, rtol=1e-4)
    if not options:
        # For all blocks one of the prompt and one of a token: none was left to Keras.
        assert len(programs._programs) == 2
        assert all(program is not None for program, _ in programs._programs.values())


@traced_only
def test_blocks_with_other_windows_or_weights_have_their_own_programs():
    lm = make_lm("windowed", sliding_window_pattern=2)
    programs = BlockPrograms()
    decode(lm, programs, {"kind": "static"}, (5, 5))
    assert len(programs._programs) == 4
    assert all(program is not None for program, _ in programs._programs.values())


@traced_only
def test_new_weights_count():
    lm, programs = make_lm(), BlockPrograms()
    before = decode(lm, programs, {}, (5, 5))
    for weight in lm.weights:
        weight.assign(0.5 * weight.value)
    after = decode(lm, programs, {}, (5, 5))
    np.testing.assert_allclose(after, decode(lm, run_block, {}, (5, 5)), atol=2e-4)
    assert np.abs(np.subtract(after, before)).max() > 0.01
    lm.blocks[1].attention.query_dense.enable_lora(2)
    decode(lm, programs, {}, (5, 5))
    assert len(programs._programs) == 4


@traced_only
def test_a_block_that_looks_at_values_runs_as_it_is():
    def curious(inputs):
        return inputs if ops.sum(inputs) < 1e9 else -inputs

    lm, programs = make_lm(), BlockPrograms()
    for block in lm.blocks:
        block.feedforward.call = curious
    decode(lm, programs, {}, (5, 5))
    assert [program for program, _ in programs._programs.values()] == [None, None]


def test_call_with_cache_leaves_its_cache_as_it_was():
    lm = shared_lm()
    cache = lm.init_cache(2, 67)
    _, _, cache = lm.call_with_cache(IDS, cache, 0)
    index = ops.convert_to_tensor(np.array([5, 5], "int32"))
    first, _, _ = lm.call_with_cache(IDS[:, :1], cache, index)
    lm.call_with_cache(IDS[:, 1:2], cache, index)
    again, _, _ = lm.call_with_cache(IDS[:, :1], cache, index)
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, (first, again)))


torch_only = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="about PyTorch"
)


@torch_only
def test_only_scatters_that_nobody_sees_are_in_place():
    import torch

    def function(buffer, other, index):
        written = torch.scatter(buffer, 0, index, torch.ones(3))
        copied = torch.scatter(other, 0, index, torch.ones(3))
        return written, copied, other[1:] * 2.0

    arguments = [torch.zeros(7), torch.arange(7.0), torch.tensor([1, 2, 5])]
    program = trace(function, arguments, donated=(0, 1))
    expected = function(*arguments)
    buffer, other = arguments[0].clone(), arguments[1].clone()
    results = program(buffer, other, arguments[2])
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)
    assert results[0].data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(other, arguments[1])


@torch_only
def test_equal_intermediates_that_are_written_to_stay_apart():
    import torch

    def function(x):
        first, second = x.pow(2).mean(-1), x.pow(2).mean(-1)
        return first.add_(1.0), second.add_(1.0)

    x = torch.arange(5.0)
    for result, wanted in zip(trace(function, [x])(x), function(x), strict=True):
        torch.testing.assert_close(result, wanted)
