"""Reading the tokens of bursts: when one has ended, or while it is made.

A burst is some decode steps in one call of a program.
"""

import select
import socket

import numpy as np
from keras import ops

from keras_kvcache.ops import can_announce

# Steps between two looks at whether to go on, such as at Ctrl-C: many, so that the
# program's loop is hardly ever left.
BURST = 64

# The most steps of a burst that is listened to, and the most bytes that it announces:
# two bursts fit into a socket's buffer, so that no program waits for its listener.
STEPS = 16
BYTES = 2**15

# Milliseconds without a word after which a listener looks whether the program ended.
PATIENCE = 1000


def make_reader(batch_size, streams):
    """What reads bursts of `batch_size` rows, for a stream or else an answer."""
    if not streams:
        return Reader(BURST)
    return Listener(batch_size) if can_announce() else Reader(steps=1)


class Reader:
    """Reads bursts that have ended.

    Args:
        steps: Of each burst.

    Attributes:
        steps: As above.
        descriptor: int32, what programs announce their tokens to, -1 for nothing;
            `None` where they can't.
    """

    def __init__(self, steps):
        self.steps = steps
        self.descriptor = np.int32(-1) if can_announce() else None

    def read(self, tokens):
        """The tokens of a burst.

        Args:
            tokens: int32 tensor `(B, any)` that the burst gives, a column a step.

        Yields:
            int32 arrays `(B, any)`, which together are the tokens.
        """
        yield ops.convert_to_numpy(tokens)[:, : self.steps]

    def close(self, tokens):
        """Ends the reading.

        Args:
            tokens: Of the last burst that was begun; `None` if there is none.
        """


class Listener(Reader):
    """Hears each step of a burst while the program goes on.

    A program that runs announces its steps to a socket; see `keras_kvcache.ops`.

    Args:
        batch_size: `B`.
    """

    def __init__(self, batch_size):
        self._message_size = 4 * (batch_size + 1)
        super().__init__(max(1, min(STEPS, BYTES // self._message_size)))
        self._ear, self._mouth = socket.socketpair()
        self.descriptor = np.int32(self._mouth.fileno())
        self._poll = select.poll()
        self._poll.register(self._ear, select.POLLIN)
        self._all_done = False

    def read(self, tokens):
        """As in the class above, an array for each step."""
        for _ in range(self.steps):
            if self._all_done or not self._hears(tokens):
                return
            message = self._ear.recv(self._message_size, socket.MSG_WAITALL)
            numbers = np.frombuffer(message, "int32")
            self._all_done = numbers[-1]
            yield numbers[:-1, None]

    def _hears(self, tokens):
        """Waits for a message; there is none if the program failed."""
        has_ended = False
        while not self._poll.poll(PATIENCE):
            if has_ended:
                return False
            has_ended = tokens.is_ready()
        return True

    def close(self, tokens):
        """As in the class above; bursts that still run end at their next step."""
        self._ear.close()
        # Until then the descriptor may not become that of something else.
        if tokens is not None:
            tokens.block_until_ready()
        self._mouth.close()
