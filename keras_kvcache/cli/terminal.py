"""Text from and to a terminal or a pipe."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def prepare_streams() -> None:
    """Replaces what output can't encode, and keeps what input can't decode.

    Otherwise Python ends with an error: in an answer at the first character that the
    terminal doesn't have, in a chat at a byte that isn't of its encoding. Bytes that
    can't be decoded come as lone surrogates, which `is_text` finds.
    """
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def is_text(text: str) -> bool:
    """Whether a string has no lone surrogates, which stand for undecodable bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_input(text: str) -> str:
    """Refuses text from standard input that couldn't be decoded.

    Args:
        text: What was read.

    Returns:
        `text`.

    Raises:
        ValueError: It isn't valid in the encoding of standard input.
    """
    if is_text(text):
        return text
    encoding = sys.stdin.encoding
    at = next(place for place, character in enumerate(text) if not is_text(character))
    received = text[at : at + 8].encode(encoding, "surrogateescape")
    raise ValueError(
        f"Standard input must be valid {encoding}. Received: {received!r} after "
        f"{at} characters"
    )


class Notices:
    """Warnings as lines on standard error, each once, and none within an answer."""

    def __init__(self):
        self._seen = set()
        self._held = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context in which warnings are shown as lines."""
        with warnings.catch_warnings():
            warnings.showwarning = self._take
            yield

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Context at whose end warnings are shown that came within."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for text in held:
                self._print(text)

    def add(self, text: str) -> None:
        """Shows a text, unless it was shown before."""
        text = " ".join(text.split())
        if text in self._seen:
            return
        self._seen.add(text)
        if self._held is None:
            self._print(text)
        else:
            self._held.append(text)

    def _take(self, message, *_, **__):
        text = str(message)
        # JAX warns for each program that it can't keep; one line is enough.
        if text.startswith("Error writing persistent compilation cache"):
            reason = text.rpartition(": ")[2]
            text = f"Compiled programs can't be kept for the next start: {reason}"
        self.add(text)

    def _print(self, text):
        print(f"keras-kvcache: warning: {text}", file=sys.stderr, flush=True)
