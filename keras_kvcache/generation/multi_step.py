"""Reading the tokens of bursts: when one has ended, or while it is made.

A burst is some decode steps in one call of a program.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops

from keras_kvcache.runtime.channel import NO_CHANNEL, Channel, can_announce

# Steps between two looks at whether to go on, such as at Ctrl-C: many, so that the
# program's loop is hardly ever left.
LONGEST_BURST = 64

# Steps of a burst that is listened to. Many enough that a call takes little of their
# time; few, as two bursts may be computed ahead, which other programs of the thread
# wait for, and which is for nothing when a stream is left.
LISTENED_BURST = 8

# Seconds without a word after which a listener looks at whether the program goes on,
# and Python at whether Ctrl-C was pressed.
TIMEOUT = 0.05


def make_reader(batch_size: int, streams: bool) -> "Reader":
    """The reader of bursts of `batch_size` rows, for a stream or else an answer."""
    if not can_announce():
        return Reader(1 if streams else LONGEST_BURST, channel=None)
    if not streams:
        return Reader(LONGEST_BURST, np.int32(NO_CHANNEL))
    return Listener(batch_size)


class Reader:
    """Reads bursts that have ended.

    Args:
        steps: Of each burst.
        channel: int32 `()`, what the bursts announce their steps to; `None` where
            programs can't announce.

    Attributes:
        steps, channel: As above.
    """

    def __init__(self, steps: int, channel: Any) -> None:
        self.steps = steps
        self.channel = channel

    def read(self, tokens: Any) -> Iterator[np.ndarray]:
        """The tokens of a burst.

        Args:
            tokens: int32 tensor `(B, any)` that the burst gives, a column a step.

        Yields:
            int32 arrays `(B, any)`, which together are the tokens.
        """
        yield ops.convert_to_numpy(tokens)[:, : self.steps]

    def close(self) -> None:
        """Ends the reading."""


class Listener(Reader):
    """Hears each step of a burst while the program goes on.

    Closed, it lets a burst that still runs end at its next step.

    Args:
        batch_size: `B`.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._channel = Channel()
        self._all_done = False
        super().__init__(LISTENED_BURST, np.int32(self._channel.number))

    def read(self, tokens: Any) -> Iterator[np.ndarray]:
        """As in the class above, an array for each step."""
        for _ in range(self.steps):
            if self._all_done:
                return
            message = self._receive(tokens)
            if message is None:
                ops.convert_to_numpy(tokens)  # Raises what the program failed with.
                raise RuntimeError("A program ended before all steps were announced.")
            self._all_done = message[-1]
            yield message[:-1, None]

    def _receive(self, tokens):
        """The message of `decode`'s next step; `None` if the program ended before."""
        message, has_ended = None, False
        while message is None and not has_ended:
            has_ended = tokens.is_ready()
            message = self._channel.receive(self._batch_size + 1, TIMEOUT)
        return message

    def close(self) -> None:
        """Ends the reading and the burst."""
        self._channel.close()
