"""Parts of error messages: quotes of foreign text, and advice on unknown arguments."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

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


def for_all(names: str, advice: Any) -> dict[str, Any]:
    """A dictionary with one advice for several names, which spaces separate."""
    return dict.fromkeys(names.split(), advice)


def refuse_unknown(
    owner: type,
    method: Callable[..., Any],
    options: Mapping[str, Any],
    advice: Mapping[str, Any],
    leaves_rest: bool = False,
) -> None:
    """Refuses names that a method doesn't have, and says what takes their place.

    Args:
        owner: The class that it's called for.
        method: The method. Where it hands arguments on to base classes, names of their
            methods are known, too.
        options: Dictionary of the arguments that were given by name.
        advice: Mapping from a name to what takes its place: a text, or a function that
            makes it of all that was given by unknown names.
        leaves_rest: Whether unknown names without advice pass.

    Raises:
        TypeError: A name is unknown.
    """
    known = _parameters(owner, method)
    unknown = {name: options[name] for name in options if name not in known}
    advised = {name: _advise(name, unknown, known, advice) for name in unknown}
    if any(advised.values()) or (unknown and not leaves_rest):
        called = method.__name__
        called = owner.__name__ if called == "__init__" else called
        raise TypeError(_message(called, known, unknown, advised))


def _parameters(owner, method):
    """Names of a method's arguments, and of its bases' if it has `**kwargs`."""
    names, methods = {}, [method]
    if _passes_on(method):
        bases = (vars(base).get(method.__name__) for base in owner.__mro__)
        methods += [base for base in bases if base is not None]
    for each in methods:
        for parameter in list(inspect.signature(each).parameters.values())[1:]:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                names.setdefault(parameter.name)
    return list(names)


def _passes_on(method):
    parameters = inspect.signature(method).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


def _advise(name, unknown, known, advice):
    """The advice on a name, or `None`."""
    if name not in advice:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if close:
            return f"write `{close[0]}`"
        close = difflib.get_close_matches(name, advice, n=1, cutoff=0.8)
        if not close:
            return None
        return f"if it is to be `{close[0]}`, {_text(advice[close[0]], unknown)}"
    return _text(advice[name], unknown)


def _text(advice, unknown):
    return advice(unknown) if callable(advice) else advice


def _message(called, known, unknown, advised):
    by_advice = {}
    for name, text in advised.items():
        by_advice.setdefault(text, []).append(f"`{name}`")
    parts = [
        f"no argument {', '.join(names)}" + (f": {text}" if text else "")
        for text, names in by_advice.items()
    ]
    received = ", ".join(
        f"{name}={quoted(value, 40)}" for name, value in unknown.items()
    )
    return (
        f"`{called}` has {'; '.join(parts)}. It takes {', '.join(known)}. "
        f"Received: {received}"
    )
