"""Chat templates, which come with a model and are not trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

_MAX_TEMPLATE_LENGTH = 200_000
_MAX_OUTPUT_LENGTH = 10_000_000


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """Writes a conversation as the text a model was trained on.

    The template runs in Jinja's immutable sandbox and sees the messages only as
    plain data. What it returns is limited in length; what it computes is limited
    no further than Jinja does, so a hostile template can still waste time.

    Args:
        template: A Jinja template, as in a model's `chat_template`.
        messages: The turns, each with a `"role"` and a `"content"`.
        bos_token: The text of the token that begins a sequence.
        eos_token: The text of the token that ends one.
        add_generation_prompt: Whether to open the assistant's turn at the end.

    Returns:
        The text, special tokens written out.

    Raises:
        TypeError: If `template` isn't a string or `messages` not a list of
            dictionaries with strings.
        ValueError: If the template is too long, has a syntax error, tries to
            leave the sandbox, uses what isn't defined, refuses the messages or
            fails in any other way. The message says which and why.
    """
    if not isinstance(template, str):
        raise TypeError(f"`template` must be a string; got {template!r}.")
    if len(template) > _MAX_TEMPLATE_LENGTH:
        raise ValueError(
            f"`template` must have at most {_MAX_TEMPLATE_LENGTH} characters; it has "
            f"{len(template)}."
        )
    values = {
        "messages": _plain(messages),
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        # Templates ask for these; absent, as None, they skip them.
        "tools": None,
        "documents": None,
    }
    import jinja2
    from jinja2.sandbox import SecurityError

    try:
        pieces, length = [], 0
        for piece in _environment().from_string(template).generate(values):
            pieces.append(piece)
            length += len(piece)
            if length > _MAX_OUTPUT_LENGTH:
                raise ValueError(
                    f"its text must have at most {_MAX_OUTPUT_LENGTH} characters"
                )
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        reason = f"has a syntax error in line {error.lineno}: {error.message}"
    except SecurityError as error:
        reason = f"tried to leave its sandbox: {error}"
    except jinja2.UndefinedError as error:
        reason = f"uses what isn't defined: {error}"
    except _Refusal as error:
        reason = f"refuses the messages: {error}"
    # Whatever else goes wrong inside it is the template's fault as well.
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {error}"
    raise ValueError(f"The chat template {reason.rstrip('.')}.")


class _Refusal(Exception):
    """Raised by a template that calls `raise_exception`."""


def _plain(messages: Any) -> list[dict[str, Any]]:
    """A copy of the messages made of JSON types only.

    Any other object may have methods that the sandbox would let a template call.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"`messages` must be a list of dictionaries; got {messages!r}.")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise TypeError(
                "every one of `messages` must be a dictionary whose 'role' and "
                f"'content' are strings; got {message!r}."
            )
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except TypeError as error:
        raise TypeError(f"`messages` must hold JSON types only: {error}.") from error


@lru_cache(maxsize=1)
def _environment():
    """Jinja as the usual chat templates expect it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        """Raises where Jinja's would quietly write nothing."""

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(
                f"it reads the attribute {attribute!r} of a {type(obj).__name__}"
            )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # Templates write JSON for a model to read, not for a web page.
    environment.filters["tojson"] = _to_json
    kept = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals = kept | {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _to_json(
    value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
