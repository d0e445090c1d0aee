"""Messages from a running program to its process.

A program's results are there once it has ended, and on a CPU a call of one with
hundreds of arrays takes a millisecond or two of a core that could compute. So a program
of many steps announces what each has made, by a few lines of C++, `channel.cc`. JAX's
callbacks could do that too, but JAX's persistent compilation cache keeps no program
that has one.
"""

import ctypes
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from keras_kvcache.runtime.native import load_handler
from keras_kvcache.runtime.platform import current_platform

NAME = "keras_kvcache_announce"
SOURCE = Path(__file__).with_suffix(".cc")

# Messages to this number are dropped.
NO_CHANNEL = 0


def can_announce() -> bool:
    """Whether programs can call `announce`, and run while their caller goes on."""
    # Of several devices each would announce the same.
    if not current_platform().calls_native:
        return False
    # Whoever changes that later gets the same messages, but at the program's end.
    if not jax.config.read("jax_cpu_enable_async_dispatch"):
        return False
    return _library() is not None


def announce(message: Any, channel: Any) -> Any:
    """Sends a message from a program.

    Args:
        message: int32 tensor of any shape.
        channel: int32 tensor `()`: a channel's number, or `NO_CHANNEL`.

    Returns:
        Boolean tensor `()`: `False` once the channel is closed. Where a program makes
        no use of it, nothing is sent.
    """
    return _announce.bind(message.astype("int32"), channel.astype("int32"))


# XLA is told of a side effect, so that it neither merges nor doubles messages. JAX is
# not, as it calls programs with one in Python, a millisecond where arguments are many.
_announce = Primitive(NAME)
_announce.def_abstract_eval(
    lambda message, channel: channel.update(shape=(), dtype=np.dtype(bool))
)
_announce.def_impl(jax.ffi.ffi_call(NAME, jax.ShapeDtypeStruct((), "bool")))
mlir.register_lowering(
    _announce, jax.ffi.ffi_lowering(NAME, has_side_effect=True), platform="cpu"
)


class Channel:
    """Where a process receives what a program announces.

    Attributes:
        number: What programs announce to, an integer that no other channel has.
    """

    def __init__(self):
        self._library = _library()
        self.number = self._library.OpenChannel()

    def receive(self, size: int, seconds: float) -> np.ndarray | None:
        """Waits for the next message, at most some seconds.

        Args:
            size: Of the message.
            seconds: After which `None` is returned; Ctrl-C is noticed as late.

        Returns:
            An int32 array `(size,)`, or `None`.
        """
        message = np.empty(size, "int32")
        address = message.ctypes.data_as(ctypes.c_void_p)
        milliseconds = int(1000 * seconds)
        has_come = self._library.Receive(self.number, address, size, milliseconds)
        return message if has_come else None

    def close(self) -> None:
        """Closes the channel: `announce` returns `False` from now on."""
        self._library.CloseChannel(self.number)


def _library():
    return load_handler(NAME, SOURCE, "Announce")
