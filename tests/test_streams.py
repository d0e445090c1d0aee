"""Streams: tokens that are heard while the program that makes them goes on."""

import socket
import subprocess
import sys

import jax
import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm

from keras_kvcache.generation import bursts
from keras_kvcache.generation.steps import NO_TOKEN
from keras_kvcache.ops import announce, can_announce, native

PROMPTS = [[2, 3, 5, 7], [11], [13, 17, 19]]

needs_announcements = pytest.mark.skipif(
    keras.backend.backend() != "jax" or native.find_compiler() is None,
    reason="programs announce under JAX and with a C++ compiler",
)


@pytest.fixture(params=["announced", "called"])
def road(request):
    """Both ways in which a stream gets its tokens."""
    if request.param == "called":
        if keras.backend.backend() == "jax":
            request.getfixturevalue("without_kernel")
        return
    if not can_announce():
        pytest.skip("programs can't announce here")


@pytest.fixture
def sockets(monkeypatch):
    """Every socket that is opened meanwhile."""
    opened, pair = [], socket.socketpair

    def open_pair():
        opened.extend(pair())
        return opened[-2:]

    monkeypatch.setattr(socket, "socketpair", open_pair)
    return opened


def join(stream, batch_size):
    rows = [[] for _ in range(batch_size)]
    for pieces in stream:
        for row, piece in zip(rows, pieces, strict=True):
            assert len(piece) <= 1
            row.extend(piece)
    return rows


def test_streams_of_any_length_end_where_answers_do(road):
    lm = make_lm(num_layers=1)
    # A burst that is listened to has 16 steps; the prompt's program makes a token, too.
    for count in (1, 2, 7, 16, 17, 18, 33, 61):
        whole = lm.generate(PROMPTS, max_new_tokens=count, strip_prompt=True)
        assert join(lm.stream(PROMPTS, max_new_tokens=count), 3) == whole
        assert [len(row) for row in whole] == [count] * 3


def test_rows_that_stop_on_their_own(road):
    lm = make_lm(num_layers=1)
    free = lm.generate(PROMPTS, max_new_tokens=43, strip_prompt=True)
    options = dict(max_new_tokens=43, stop_token_ids=[free[0][5], free[1][23]])
    stopped = lm.generate(PROMPTS, strip_prompt=True, **options)
    assert len({len(row) for row in stopped}) > 1
    assert join(lm.stream(PROMPTS, **options), 3) == stopped


def test_streams_that_take_turns(road):
    lm = make_lm(num_layers=1)
    expected = lm.generate(PROMPTS, max_new_tokens=37, strip_prompt=True)
    streams = [lm.stream(prompt, max_new_tokens=37) for prompt in PROMPTS]
    pieces = list(zip(*streams, strict=True))
    assert [sum(row, []) for row in zip(*pieces, strict=True)] == expected


def test_a_stream_survives_training(road):
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


@needs_announcements
def test_a_stream_closes_its_sockets(sockets):
    lm = shared_lm()
    list(lm.stream([1, 2, 3], max_new_tokens=5))
    abandoned = lm.stream([1, 2, 3], max_new_tokens=300)
    next(abandoned), next(abandoned)
    assert len(sockets) == 4 and sockets[-1].fileno() >= 0
    del abandoned
    lm.stream([1, 2, 3], max_new_tokens=5)  # never looked at
    list(lm.stream([1, 2, 3], max_new_tokens=1))  # all done by the prompt's program
    assert len(sockets) == 4
    assert all(end.fileno() < 0 for end in sockets)


@needs_announcements
def test_an_error_within_a_stream_is_raised_and_leaves_no_socket(sockets, monkeypatch):
    lm = make_lm(num_layers=1)
    stream = lm.stream([1, 2, 3], max_new_tokens=67)
    next(stream), next(stream)
    lm.trainable_weights[0].value.delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        list(stream)
    assert len(sockets) == 2 and all(end.fileno() < 0 for end in sockets)


@needs_announcements
def test_a_program_is_heard_while_it_goes_on():
    """It would never end otherwise."""
    ear, mouth = socket.socketpair()
    ear.settimeout(100)

    @jax.jit
    def count_up(descriptor, work):
        def body(loop):
            number, _, work = loop
            numbers = jax.numpy.stack([number, number * number])
            return number + 1, announce(numbers, descriptor), work @ work

        loop = (np.int32(0), True, work)
        return jax.lax.while_loop(lambda loop: loop[1], body, loop)

    assert can_announce()
    # XLA runs a program that costs next to nothing before its call returns.
    number, is_heard, _ = count_up(mouth.fileno(), np.zeros((97, 97), "float32"))
    for expected in range(1000):
        message = np.frombuffer(ear.recv(8), "int32")
        assert message.tolist() == [expected, expected**2]
    assert not number.is_ready()
    ear.close()
    assert int(number) >= 1000 and not bool(is_heard)
    mouth.close()


# Python ignores the signal; a program that restores what it does may still leave a
# stream before its end.
ABANDONED = """
import signal
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from conftest import make_lm
stream = make_lm(num_layers=1).stream([1, 2, 3], max_new_tokens=500)
next(stream), next(stream)
del stream
print("alive")
"""


@needs_announcements
def test_no_signal_ends_the_process_of_an_abandoned_stream(pytestconfig):
    folder = pytestconfig.rootpath / "tests"
    command = [sys.executable, "-c", ABANDONED]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr


@needs_announcements
def test_where_programs_do_not_announce(without_kernel, monkeypatch):
    assert not can_announce()
    without_kernel()
    assert can_announce()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 2)
        assert not can_announce()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        assert not can_announce()
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", True)


@needs_announcements
@pytest.mark.parametrize("batch_size", [1, 7, 511, 8191, 9001])
def test_two_bursts_fit_into_a_socket(batch_size, sockets):
    listener = bursts.Listener(batch_size)
    assert listener.steps == max(1, min(16, 2**15 // (4 * (batch_size + 1))))
    _, mouth = sockets
    mouth.setblocking(False)
    numbers = np.arange(2 * listener.steps * (batch_size + 1), dtype="int32")
    steps = numbers.reshape(2 * listener.steps, batch_size + 1)
    steps[:, -1] = 0
    for step in steps:
        assert mouth.send(step) == step.nbytes
    for burst in np.split(steps, 2):
        columns = list(listener.read(None))
        np.testing.assert_array_equal(np.concatenate(columns, axis=1).T, burst[:, :-1])
    listener.close(None)


class Ended:
    """Of a program that failed before it announced a step."""

    def is_ready(self):
        return True


@needs_announcements
def test_a_listener_gives_up_once_a_program_has_ended(sockets, monkeypatch):
    monkeypatch.setattr(bursts, "PATIENCE", 1)
    listener = bursts.Listener(batch_size=2)
    sockets[1].sendall(np.array([3, NO_TOKEN, 0], "int32"))
    columns = list(listener.read(Ended()))
    assert [column.tolist() for column in columns] == [[[3], [NO_TOKEN]]]
    sockets[1].sendall(np.array([5, 7, 1], "int32"))
    assert len(list(listener.read(Ended()))) == 1
    assert list(listener.read(None)) == []  # as all rows are done
    listener.close(None)
