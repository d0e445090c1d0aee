"""Telling the host what a program has made while the program goes on.

A program's results are there once it has ended, and on a CPU a call of one with
hundreds of arrays takes a millisecond or two of a core that could compute. So a program
of many steps sends what each has made to a socket, by a few lines of C++,
`announce.cc`. JAX's callbacks could do that too, but JAX's persistent compilation cache
keeps no program that has one.
"""

from pathlib import Path

import jax

from keras_kvcache.ops.native import has_handler
from keras_kvcache.ops.platform import is_jax_on_cpu

NAME = "keras_kvcache_announce"
SOURCE = Path(__file__).with_suffix(".cc")


def can_announce():
    """Whether programs can call `announce`, and run while their caller goes on."""
    # Of several devices each would announce the same.
    if not is_jax_on_cpu() or jax.device_count() > 1:
        return False
    if not jax.config.read("jax_cpu_enable_async_dispatch"):
        return False
    return has_handler(NAME, SOURCE, "Announce")


def announce(message, descriptor):
    """Sends an array to a socket, within a program.

    Args:
        message: int32 tensor of any shape.
        descriptor: int32 tensor `()`: the socket's file descriptor; negative, nothing
            is sent. It must stay open until the program has ended.

    Returns:
        Boolean tensor `()`: `False` once nobody can hear it.
    """
    result = jax.ShapeDtypeStruct((), "bool")
    call = jax.ffi.ffi_call(NAME, result, has_side_effect=True)
    return call(message, descriptor)
