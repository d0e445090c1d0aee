"""Streams: tokens that are heard while the program that makes them goes on."""

import jax
import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm

from keras_kvcache.generation import multi_step
from keras_kvcache.generation.rows import NO_TOKEN
from keras_kvcache.runtime import native
from keras_kvcache.runtime.channel import NO_CHANNEL, Channel, announce, can_announce
from keras_kvcache.runtime.platform import current_platform

PROMPTS = [[2, 3, 5, 7], [11], [13, 17, 19]]

# Not `can_announce`, so that it shows where that is wrong.
needs_channels = pytest.mark.skipif(
    not current_platform().calls_native or native.find_compiler() is None,
    reason="programs announce under JAX, on one CPU and with a C++ compiler",
)


@pytest.fixture(params=[pytest.param("announced", marks=needs_channels), "called"])
def way(request):
    """Both ways in which a stream gets its tokens."""
    if request.param == "called" and keras.backend.backend() == "jax":
        request.getfixturevalue("without_compiler")


@pytest.fixture
def channels(monkeypatch):
    """Every channel that a stream opens meanwhile."""
    opened = []

    def open_channel():
        opened.append(Channel())
        return opened[-1]

    monkeypatch.setattr(multi_step, "Channel", open_channel)
    return opened


def is_open(channel):
    return bool(jax.jit(announce)(np.zeros(3, "int32"), np.int32(channel.number)))


def join(stream, batch_size):
    rows = [[] for _ in range(batch_size)]
    for pieces in stream:
        for row, piece in zip(rows, pieces, strict=True):
            assert len(piece) <= 1
            row.extend(piece)
    return rows


def test_streams_of_any_length_end_where_answers_do(way):
    lm = make_lm(num_layers=1)
    # A burst that is listened to has 8 steps; the prompt's program makes a token, too.
    for count in (1, 2, 7, 8, 9, 10, 17, 61):
        whole = lm.generate(PROMPTS, max_new_tokens=count, strip_prompt=True)
        assert join(lm.stream(PROMPTS, max_new_tokens=count), 3) == whole
        assert [len(row) for row in whole] == [count] * 3


def test_rows_that_stop_on_their_own(way):
    lm = make_lm(num_layers=1)
    free = lm.generate(PROMPTS, max_new_tokens=43, strip_prompt=True)
    options = dict(max_new_tokens=43, stop_token_ids=[free[0][5], free[1][23]])
    stopped = lm.generate(PROMPTS, strip_prompt=True, **options)
    assert len({len(row) for row in stopped}) > 1
    assert join(lm.stream(PROMPTS, **options), 3) == stopped


def test_streams_that_take_turns(way):
    lm = make_lm(num_layers=1)
    expected = lm.generate(PROMPTS, max_new_tokens=37, strip_prompt=True)
    streams = [lm.stream(prompt, max_new_tokens=37) for prompt in PROMPTS]
    pieces = list(zip(*streams, strict=True))
    assert [sum(row, []) for row in zip(*pieces, strict=True)] == expected


def test_a_stream_survives_training(way):
    lm = make_lm(num_layers=1)
    lm.compile()
    stream = lm.stream([1, 2, 3], max_new_tokens=67)
    added = next(stream) + next(stream)
    ids = np.array([[5, 7, 11]])
    held = [variable.value for variable in lm.variables]
    lm.fit(ids, ids, verbose=0)
    if keras.backend.backend() == "jax":
        assert any(weight.is_deleted() for weight in held)
    for piece in stream:
        added += piece
    assert len(added) == 67


@needs_channels
def test_a_stream_closes_its_channel(channels):
    lm = shared_lm()
    list(lm.stream([1, 2, 3], max_new_tokens=5))
    abandoned = lm.stream([1, 2, 3], max_new_tokens=300)
    next(abandoned), next(abandoned)
    assert [is_open(channel) for channel in channels] == [False, True]
    del abandoned
    lm.stream([1, 2, 3], max_new_tokens=5)  # never looked at
    list(lm.stream([1, 2, 3], max_new_tokens=1))  # all done by the prompt's program
    lm.generate([1, 2, 3], max_new_tokens=5)
    assert [is_open(channel) for channel in channels] == [False, False]
    assert channels[0].number != channels[1].number


@needs_channels
def test_an_error_within_a_stream_is_raised_and_closes_its_channel(channels):
    lm = make_lm(num_layers=1)
    stream = lm.stream([1, 2, 3], max_new_tokens=67)
    next(stream), next(stream)
    lm.trainable_weights[0].value.delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        list(stream)
    assert [is_open(channel) for channel in channels] == [False]


@jax.jit
def count_up(channel, work):
    """Announces numbers with their squares as long as anybody listens."""

    def goes_on(loop):
        number, is_heard, _ = loop
        return (number < 10**6) & is_heard

    def body(loop):
        number, _, work = loop
        numbers = jax.numpy.stack([number, number * number])
        return number + 1, announce(numbers, channel), work @ work

    return jax.lax.while_loop(goes_on, body, (np.int32(0), True, work))


@needs_channels
def test_a_program_is_heard_while_it_goes_on():
    assert can_announce()
    channel = Channel()
    # XLA runs a program that costs next to nothing before its call returns.
    work = np.zeros((97, 97), "float32")
    try:
        number, is_heard, _ = count_up(np.int32(channel.number), work)
        for expected in range(1000):
            message = channel.receive(2, seconds=100)
            assert message.tolist() == [expected, expected**2]
    finally:
        channel.close()
    assert 1000 <= int(number) < 10**6
    assert not bool(is_heard)


@needs_channels
def test_equal_messages_are_all_sent():
    """XLA would make one call of the two."""
    assert can_announce()
    channel = Channel()

    @jax.jit
    def say_twice(message, number):
        return announce(message, number) & announce(message, number)

    message = np.array([2, 3, 5], "int32")
    assert say_twice(message, np.int32(channel.number))
    heard = [channel.receive(3, 1), channel.receive(3, 1)]
    np.testing.assert_array_equal(heard, [message, message])
    assert channel.receive(3, 0) is None
    channel.close()


@needs_channels
def test_without_jit():
    channel = Channel()
    with jax.disable_jit():
        assert announce(np.array([7, 11], "int32"), np.int32(channel.number))
    assert channel.receive(2, 1).tolist() == [7, 11]
    channel.close()


@needs_channels
def test_channels_keep_messages_in_order_and_apart():
    assert can_announce()
    say, channels = jax.jit(announce), [Channel(), Channel()]
    numbers = [np.int32(channel.number) for channel in channels]
    for first in range(5):
        for number in numbers:
            assert say(np.array([first, number, -7], "int32"), number)
    assert channels[0].receive(2, 0) is None  # of another size
    for first in range(5):
        for channel in channels:
            assert channel.receive(3, 1).tolist() == [first, channel.number, -7]
    assert [channel.receive(3, 0) for channel in channels] == [None, None]
    channels[0].close()
    assert not say(np.zeros(3, "int32"), numbers[0])
    assert channels[0].receive(3, 0) is None
    assert say(np.zeros(3, "int32"), numbers[1])
    assert say(np.zeros(3, "int32"), np.int32(NO_CHANNEL))
    channels[1].close()


@needs_channels
def test_announcing_keeps_a_program_on_the_fast_road():
    """JAX calls a program with effects in Python, a millisecond in large ones."""
    assert can_announce()
    traced = jax.make_jaxpr(announce)(np.zeros(3, "int32"), np.int32(NO_CHANNEL))
    assert not traced.effects


@needs_channels
def test_where_programs_do_not_announce(without_compiler, monkeypatch):
    assert not can_announce()
    without_compiler()
    assert can_announce()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 2)
        assert not can_announce()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        assert not can_announce()
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", True)


class Ended:
    """The tokens of a program that has ended, and what reading them raises."""

    def __init__(self, error=None):
        self._error = error

    def is_ready(self):
        return True

    def __array__(self, *_, **__):
        if self._error:
            raise self._error
        return np.zeros((2, 64), "int32")


@needs_channels
@pytest.mark.parametrize("error", [None, MemoryError("of the program")])
def test_a_program_that_ends_before_its_time_is_told_about(error):
    listener = multi_step.Listener(batch_size=2)
    say = jax.jit(announce)
    say(np.array([3, NO_TOKEN, 0], "int32"), listener.channel)
    say(np.array([5, 7, 0], "int32"), listener.channel)
    columns = listener.read(Ended(error))
    assert next(columns).tolist() == [[3], [NO_TOKEN]]
    assert next(columns).tolist() == [[5], [7]]
    expected = MemoryError if error else RuntimeError
    with pytest.raises(expected, match="of the program|ended before all steps"):
        next(columns)
    listener.close()


@needs_channels
def test_a_listener_reads_no_further_once_all_rows_are_done():
    listener = multi_step.Listener(batch_size=2)
    jax.jit(announce)(np.array([5, 7, 1], "int32"), listener.channel)
    assert len(list(listener.read(jax.numpy.zeros((2, 64))))) == 1
    assert list(listener.read(None)) == []
    listener.close()
