"""The arguments of `generate` and `stream`: written once, read and checked."""

import functools
import inspect
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from keras_kvcache.caches import Codec, Rolling, Static
from keras_kvcache.errors import refuse_unknown
from keras_kvcache.generation.foreign_arguments import ADVICE
from keras_kvcache.runtime.concrete import is_integer

# Ends and ids are int32.
MOST = int(np.iinfo("int32").max)


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `generate`: its arguments but for the inputs.

    Attributes:
        max_length: The most tokens of prompt and answer together.
        max_new_tokens: The most new tokens. The smallest of both and of the model's own
            limit counts. If a dictionary comes and neither is given, its width
            is the limit, as in keras-hub.
        stop_token_ids: Ids that end a row, which keeps them: `"auto"` for the
            tokenizer's, `None` for none, or ids.
        strip_prompt: Whether to give the new tokens or text only.
        sampler: As in `samplers.get`; `None` for the default.
        seed: Integer. The same seed gives the same answer; `None` draws one from
            Python's `random`, which `keras.utils.set_random_seed` seeds.
        cache: What to keep keys and values in: a kind (`"auto"`, `"static"`,
            `"rolling"`, `keras_kvcache.caches.Rolling(window=…)`), a codec
            (`"float32"`, `"bfloat16"`, `"float16"`, `"int8"`, `"int4"`), or a
            dictionary of `"kind"`, `"codec"` and `"layout"`. `None` for the model's
            choice.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: Literal["auto"] | int | Sequence[int] | None = "auto"
    strip_prompt: bool = False
    sampler: str | Callable | None = None
    seed: int | None = None
    cache: str | Static | Rolling | Codec | dict | None = None

    def seed_word(self) -> np.uint32:
        """The seed as an unsigned 32-bit number; one from `random` if there is none.

        Raises:
            TypeError: It isn't an integer.
        """
        seed = random.randrange(2**32) if self.seed is None else self.seed
        if not is_integer(seed):
            raise TypeError(f"`seed` must be an integer. Received: {seed!r}")
        return np.uint32(int(seed) % 2**32)


def takes_options(*left_out: Any) -> Callable:
    """Decorates a method of inputs and of `GenerateOptions` that users call.

    They give each option by its name or place. A line `{options}` of the docstring is
    replaced by what the options mean.

    Args:
        *left_out: Options that the method doesn't have.
    """
    taken = [field for field in fields(GenerateOptions) if field.name not in left_out]

    def decorate(method):
        plain = inspect.signature(method)
        own = list(plain.parameters.values())[:2]
        added = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=field.default,
                annotation=field.type,
            )
            for field in taken
        ]
        signature = plain.replace(parameters=own + added)

        @functools.wraps(method)
        def with_options(*arguments, **named):
            given = _bind(with_options, signature, arguments, named)
            self, inputs = (given.pop(parameter.name) for parameter in own)
            return method(self, inputs, GenerateOptions(**given))

        with_options.__signature__ = signature
        with_options.__doc__ = documented(method.__doc__, [f.name for f in taken])
        return with_options

    return decorate


def takes_options_of(method: Callable) -> Callable:
    """Decorates a function that passes `**options` on to `method`.

    It gets the signature of `method`.

    A line `{options}` of its docstring is replaced by what they mean.
    """

    def decorate(function):
        signature = inspect.signature(method)
        names = list(signature.parameters)

        @functools.wraps(function)
        def with_options(*arguments, **named):
            given = _bind(with_options, signature, arguments, named)
            own = [given.pop(name) for name in names[:2]]
            return function(*own, **given)

        with_options.__signature__ = signature
        with_options.__doc__ = documented(function.__doc__, names)
        return with_options

    return decorate


def as_method(method: Callable) -> Callable:
    """A method of `Generator` as one of a model that has a `generator`.

    Signature and documentation are the same.
    """

    @functools.wraps(method)
    def of_model(self, *arguments, **options):
        return method(self.generator, *arguments, **options)

    return of_model


def _bind(method, signature, arguments, named):
    """Arguments by name; unknown ones are told what takes their place."""
    try:
        return signature.bind(*arguments, **named).arguments
    except TypeError:
        refuse_unknown(type(arguments[0]), method, named, ADVICE)
        raise


def documented(docstring: str | None, names: Sequence[str]) -> str | None:
    """A method's docstring with the meaning of options in the place of `{options}`.

    Args:
        docstring: As it stands in the source of a class, or without its indentation,
            which Python 3.13 takes away.
        names: The options that the method has.
    """
    if docstring is None:  # as under `python -OO`
        return None
    attributes = inspect.getdoc(GenerateOptions).split("Attributes:\n")[1]
    entries = re.split(r"^ {4}(?=\w+: )", attributes, flags=re.M)[1:]
    wanted = [entry for entry in entries if entry.split(":")[0] in names]
    text = "".join(f"{' ' * 4}{entry}" for entry in wanted).rstrip()
    return inspect.cleandoc(docstring).replace(f"{' ' * 4}{{options}}", text)


def row_ends(
    lengths: Sequence[int],
    max_length: int | None,
    max_new_tokens: int | None,
    context: int | None,
    may_be_full: bool = False,
) -> np.ndarray:
    """The position past the last token of each row.

    Args:
        lengths: Length of each prompt.
        max_length: The most tokens of prompt and answer together, or `None`.
        max_new_tokens: The most new tokens, or `None`.
        context: The most positions that the model knows, or `None` if endless.
        may_be_full: Whether a row may be without room for a new token.

    Returns:
        An int32 array, one end a row. The smallest limit given counts.

    Raises:
        TypeError: A limit isn't an integer.
        ValueError: A limit isn't positive, none is given, or one leaves a row no
            room for a new token.
    """
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is None:
            continue
        if not is_integer(value):
            raise TypeError(f"`{name}` must be an integer. Received: {value!r}")
        if value <= 0:
            raise ValueError(f"`{name}` must be positive. Received: {value}")
    if max_length is None and max_new_tokens is None and context is None:
        raise ValueError(
            "`max_length` or `max_new_tokens` must be given for a model without a "
            "longest sequence. Received: None for both"
        )
    room = 0 if may_be_full else 1
    longest = max(lengths)
    if context is not None and longest + room > context:
        raise ValueError(
            "`inputs` must leave room for a new token in the model's context of "
            f"{context} tokens. Received: a prompt of {longest} tokens"
        )
    if max_length is not None and longest + room > max_length:
        raise ValueError(
            "`max_length` counts the prompt too and must leave room for a new "
            f"token. Received: max_length={max_length}, a prompt of {longest} tokens"
        )
    limits = [limit for limit in (max_length, context) if limit is not None]
    if max_new_tokens is not None:
        ends = [min(length + max_new_tokens, *limits, MOST) for length in lengths]
    else:
        ends = [min(limits)] * len(lengths)
    return np.array(ends, "int32")


def read_stop_token_ids(stop_token_ids: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a row, as a sorted tuple.

    Args:
        stop_token_ids: `"auto"` for the tokenizer's (none without a tokenizer),
            `None` for none, an id or ids.
        tokenizer: Object with `stop_token_ids`, or `None`.

    Raises:
        TypeError: They aren't ids.
    """
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        stop_token_ids = () if tokenizer is None else tokenizer.stop_token_ids
    if stop_token_ids is None:
        return ()
    if is_integer(stop_token_ids):
        stop_token_ids = (stop_token_ids,)
    is_iterable = isinstance(stop_token_ids, Iterable)
    ids = list(stop_token_ids) if is_iterable else [None]
    if isinstance(stop_token_ids, str) or not all(_is_id(token) for token in ids):
        raise TypeError(
            "`stop_token_ids` must be 'auto', `None`, an id or ids, integers from 0 "
            f"on. Received: {stop_token_ids!r}"
        )
    return tuple(sorted({int(token) for token in ids}))


def _is_id(token):
    return is_integer(token) and 0 <= token <= MOST
