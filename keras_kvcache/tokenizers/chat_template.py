"""Chat templates, which come with a model and are not trusted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from keras_kvcache.errors import quoted, shortened
from keras_kvcache.tokenizers.final_message import (
    REASONING,
    cut_after_ending,
    mark_ending,
)

_MAX_TEMPLATE_LENGTH = 200_000
_MAX_OUTPUT_LENGTH = 10_000_000


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """Writes a conversation as the text a model was trained on.

    The text is that of transformers. The template runs in Jinja's immutable sandbox and
    sees what it is given only as plain data. The length of its text is limited. What it
    computes is limited no further than Jinja does, so a hostile template can still
    waste time.

    Args:
        template: A Jinja template, as in a model's `chat_template`.
        messages: The turns, each with a `"role"` and most often a `"content"`: a
            string, a list of parts or `None`.
        tools: JSON schemas of the functions that the model may call.
        documents: What the model may read, dictionaries, often with a `"title"` and
            a `"text"`.
        add_generation_prompt: Whether to open the assistant's turn at the end; `None`
            for `True`, or `False` where the last message is continued.
        continue_final_message: Whether to end within the last message, which the model
            then continues; or the key to continue, if not `"content"`.
        **variables: What else the template asks for, such as `bos_token`.

    Returns:
        The text, special tokens written out.

    Raises:
        TypeError: `template` isn't a string, `messages`, `tools` or `documents`
            not a list of dictionaries, or one of them holds other than JSON types.
        ValueError: The template is too long, has a syntax error, tries to
            leave the sandbox, uses what isn't defined, refuses the messages or
            fails in any other way, or if there is nothing to continue. The message
            says which and why.
    """
    if not isinstance(template, str):
        raise TypeError(f"`template` must be a string. Received: {quoted(template)}")
    if len(template) > _MAX_TEMPLATE_LENGTH:
        raise ValueError(
            f"`template` must have at most {_MAX_TEMPLATE_LENGTH} characters. "
            f"Received: {len(template)}"
        )
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "`add_generation_prompt` and `continue_final_message` exclude each other. "
            "Received: True for both"
        )
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    messages = _read_messages(messages)
    ending = None
    if continue_final_message:
        key = continue_final_message
        key = key if isinstance(key, str) else "content"
        ending = mark_ending(template, messages, key)
    values = {
        # Templates expect these two to be defined.
        "bos_token": "",
        "eos_token": "",
        **_plain("variables", variables),
        "messages": messages,
        "tools": None if tools is None else _read_list("tools", tools),
        "documents": None if documents is None else _read_list("documents", documents),
        "add_generation_prompt": add_generation_prompt,
    }
    text = _render(template, values)
    return text if ending is None else cut_after_ending(text, ending)


def without_nulls(messages: Any) -> Any:
    """Messages without entries that are `None`, which many templates would write."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        return messages
    messages = [_as_mapping(message) for message in messages]
    return [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]


def _render(template: str, values: dict[str, Any]) -> str:
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
        reason = f"tried to leave its sandbox: {shortened(error, 500)}"
    except jinja2.UndefinedError as error:
        reason = f"uses what isn't defined: {shortened(error, 500)}"
    except _Refusal as error:
        reason = f"refuses the messages: {shortened(error, 500)}"
    # Whatever else goes wrong inside it is the template's fault as well.
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {shortened(error, 500)}"
    raise ValueError(f"The chat template {reason.rstrip('.')}.")


class _Refusal(Exception):
    """Raised by a template that calls `raise_exception`."""


def _read_messages(messages: Any) -> list[dict[str, Any]]:
    messages = _read_list("messages", messages)
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise TypeError(
                "every one of `messages` must be a dictionary whose 'role' is a "
                f"string. Received: {quoted(message)}"
            )
    return [_with_reasoning(message) for message in messages]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by three names; templates read the first or the second."""
    found = (message.get(name) for name in REASONING)
    reasoning = next((text for text in found if text is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _read_list(name: str, values: Any) -> list[dict[str, Any]]:
    """A copy of a list of dictionaries made of JSON types only."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(
            f"`{name}` must be a list of dictionaries. Received: {quoted(values)}"
        )
    values = [_as_mapping(value) for value in values]
    for value in values:
        if callable(value):
            raise TypeError(
                f"`{name}` must be dictionaries, for a function its JSON schema: "
                "{'type': 'function', 'function': {'name': …, 'description': …, "
                "'parameters': …}}, which `transformers.utils.get_json_schema` makes "
                f"of one. Received: {quoted(value)}"
            )
        if not isinstance(value, Mapping):
            raise TypeError(
                f"every one of `{name}` must be a dictionary. Received: {quoted(value)}"
            )
    return _plain(name, values)


def _as_mapping(value: Any) -> Any:
    """A dataclass or Pydantic model, as other libraries return, as a dictionary."""
    if isinstance(value, type):
        return value
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    return value


def _plain(name: str, value: Any) -> Any:
    """A copy made of JSON types only, tuples included.

    Any other object may have methods that the sandbox would let a template call.
    """
    try:
        return _copy(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must hold JSON types only: {shortened(error, 500)}."
        ) from error
    except RecursionError as error:
        raise ValueError(f"`{name}` must not hold itself.") from error


def _copy(value: Any) -> Any:
    value = _as_mapping(value)
    if value is None or type(value) in (str, int, float, bool):
        return value
    # A subclass's own methods stay behind.
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, np.generic):
        return _copy(value.item())
    if isinstance(value, Mapping):
        return {_copy(key): _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copy(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"it holds {quoted(value)} of type {type(value).__name__}")


@lru_cache(maxsize=1)
def _environment():
    """Jinja as the usual chat templates expect it."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    from jinja2.utils import Cycler, Joiner

    class Sandbox(ImmutableSandboxedEnvironment):
        """Raises where Jinja's would quietly write nothing."""

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(
                f"it reads the attribute {quoted(attribute)} of a {type(obj).__name__}"
            )

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's text, writes its body."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("write")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def write(self, caller):
            return caller()

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    # Templates write JSON for a model to read, not for a web page.
    environment.filters["tojson"] = _to_json
    kept = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals = kept | {
        "joiner": _Function(Joiner),
        "cycler": _Function(Cycler),
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


class _Function:
    """A function that has no attributes for a template."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    def __getattr__(self, name):
        from jinja2 import UndefinedError

        # Jinja itself looks for these.
        if name.startswith(("_", "jinja_")) or name in (
            "unsafe_callable",
            "alters_data",
        ):
            raise AttributeError(name)
        raise UndefinedError(f"a function has no attribute {quoted(name)}")


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
