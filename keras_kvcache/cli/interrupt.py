"""Handles Ctrl-C (SIGINT) in the command line.

Python's own handler raises `KeyboardInterrupt` wherever the interpreter is: within a
bare `except` of an import, or a callback of XLA or of the garbage collector, where it
is swallowed; and Python would end while XLA still computes, which crashes. So Ctrl-C
ends the command's process at once, from before the slow imports on. Python's own
handler is back where something must be done first: while a model is downloaded and at
the prompt of a chat. Within an answer of a chat it is noted.

A program that imports the package keeps its own handler.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def set_handler(handler: Any) -> Any:
    """Gives Ctrl-C a handler, unless it is ignored or handled outside of Python.

    Returns:
        The handler so far.
    """
    before = signal.getsignal(signal.SIGINT)
    # Python calls handlers in the main thread only, and only it may set them.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and before not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, handler)
    return before


def end_process(*_: Any) -> None:
    """A handler that ends the process with status 130, whatever it is doing."""
    try:
        # Not `print`, which may be what was interrupted.
        os.write(2, b"\n")
    finally:
        os._exit(130)


@contextmanager
def interrupt_raises() -> Iterator[None]:
    """Context in which Ctrl-C raises `KeyboardInterrupt`."""
    before = set_handler(signal.default_int_handler)
    try:
        yield
    finally:
        set_handler(before)


class Interrupt:
    """Ctrl-C while programs are compiled and run.

    The first one is noted, or ends the process at once; a second one does.

    Args:
        is_noted: Whether the first one is noted, in the attribute `was_received`.
    """

    def __init__(self, is_noted):
        self._is_noted = is_noted
        self.was_received = False

    def __enter__(self):
        self._before = set_handler(self._handle)
        return self

    def __exit__(self, *_):
        set_handler(self._before)

    def _handle(self, *_):
        if self.was_received or not self._is_noted:
            end_process()
        self.was_received = True
