"""Quotes of foreign text, such as what a file says: an error message stays short."""

from __future__ import annotations

import reprlib

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def quoted(value: object, longest: int = 80) -> str:
    """The `repr` of a value, as much of it as a message needs.

    Args:
        value: Anything, however long.
        longest: The most characters.
    """
    return shortened(_REPR.repr(value), longest)


def shortened(text: object, longest: int = 80) -> str:
    """A text without its middle if it's long.

    Args:
        text: A string, or an error whose message it is.
        longest: The most characters.
    """
    text = str(text)
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 1]}…{text[-end:]}"
