"""Chunks and single tokens by traced blocks, where no decode loop is compiled."""

import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm
from keras import ops

from keras_kvcache.layers.block_programs import BlockPrograms, run_block
from keras_kvcache.runtime.tracing import can_trace, trace

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CACHES = [
    {},
    {"layout": "dense"},
    {"codec": "int8"},
    {"codec": "int4"},
    {"codec": "bfloat16"},
]

torch_only = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="about PyTorch"
)
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


class Reading(keras.layers.Layer):
    """Scales by a number that it reads from its inputs in Python."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def call(self, inputs):
        return inputs * self.read(inputs)


def by_numpy(inputs):
    return float(np.tanh(ops.convert_to_numpy(inputs)).mean())


def by_item(inputs):
    return ops.mean(inputs).item() if hasattr(inputs, "item") else by_numpy(inputs)


def by_condition(inputs):
    return 0.5 if ops.sum(inputs) < 0.0 else 1.5


def by_list(inputs):
    return ops.convert_to_numpy(inputs).ravel().tolist()[0]


def by_text(inputs):
    return float(str(inputs).count("-"))


def by_count(inputs):
    return len(ops.nonzero(inputs > 0)[0]) / 7


READS = [by_numpy, by_item, by_condition, by_list, by_text, by_count]


@traced_only
@pytest.mark.parametrize("read", READS)
def test_a_block_that_reads_values_runs_as_it_is(read):
    if (read, keras.backend.backend()) == (by_text, "tensorflow"):
        pytest.skip("the text of a tensor in a graph is its name")
    lm, programs = make_lm(), BlockPrograms()
    for block in lm.blocks:
        block.feedforward.call = Reading(read).__call__
    ours = decode(lm, programs, {}, (5, 5))
    np.testing.assert_allclose(ours, decode(lm, run_block, {}, (5, 5)), atol=2e-4)
    assert {program for program, _ in programs._programs.values()} == {None}


@torch_only
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.detach().numpy()[0],
        lambda x: x.data.cpu().numpy().sum(),
        lambda x: np.asarray(x.detach())[0],
        lambda x: np.from_dlpack(x.detach())[0],
        lambda x: x.tolist()[0],
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: float(f"{x[0]:.3f}"),
        lambda x: x[x > 1.0],
        lambda x: x.nonzero().shape[0],
        lambda x: x.unique(),
        lambda x: len(x[x > 1.0]),
        lambda x: 2.0 if x.equal(x + 1) else 3.0,
    ],
)
def test_values_that_a_function_reads_are_no_constants(read):
    import torch

    with pytest.raises((ValueError, RuntimeError), match="only|depend|value"):
        trace(lambda x: (x * read(x),), [torch.tensor([2.0, 3.0])])


@torch_only
def test_constants_may_be_read():
    import torch

    def function(x):
        row = torch.tensor([3])
        return (x[row] * row.item(),)

    x = torch.arange(5.0)
    program = trace(function, [x])
    torch.testing.assert_close(program(2 * x), function(2 * x))


@traced_only
def test_a_block_that_keeps_a_state_runs_as_it_is():
    class Counting(keras.layers.Layer):
        def build(self, input_shape):
            self.calls = self.add_weight((), "zeros", "int32", trainable=False)

        def call(self, inputs):
            self.calls.assign(self.calls + 1)
            return inputs * ops.cast(self.calls, inputs.dtype)

    lm, programs = make_lm(num_layers=1), BlockPrograms()
    counting = Counting()
    counting.build(None)
    lm.blocks[0].feedforward.call = counting.__call__
    decode(lm, programs, {}, (5, 5))
    assert int(counting.calls) == 4
    assert {program for program, _ in programs._programs.values()} == {None}


@traced_only
def test_weights_that_are_not_the_blocks_are_no_constants():
    lm, programs = make_lm(num_layers=1), BlockPrograms()
    scale = keras.Variable(1.0)
    lm.blocks[0].feedforward.call = lambda inputs: inputs + scale
    before = decode(lm, programs, {}, (5, 5))
    scale.assign(3.0)
    after = decode(lm, programs, {}, (5, 5))
    np.testing.assert_allclose(after, decode(lm, run_block, {}, (5, 5)), atol=2e-4)
    assert np.abs(np.subtract(after, before)).max() > 0.01


def test_call_with_cache_leaves_its_cache_as_it_was():
    lm = shared_lm()
    cache = lm.init_cache(2, 67)
    _, _, cache = lm.call_with_cache(IDS, cache, 0)
    index = ops.convert_to_tensor(np.array([5, 5], "int32"))
    first, _, _ = lm.call_with_cache(IDS[:, :1], cache, index)
    lm.call_with_cache(IDS[:, 1:2], cache, index)
    again, _, _ = lm.call_with_cache(IDS[:, :1], cache, index)
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, (first, again)))


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
