"""The arguments of `generate` and `stream`, written once."""

import functools
import inspect
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from keras_kvcache.caches import Codec, Rolling, Static
from keras_kvcache.runtime.concrete import is_integer


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `generate`: its arguments but for the inputs.

    Attributes:
        max_length: The most tokens of prompt and answer together.
        max_new_tokens: The most new tokens. The smallest of both and of the model's own
            limit counts. For a dictionary without either, `T` is the `max_length`, as
            in keras-hub.
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

    def seed_word(self):
        """The seed as an unsigned 32-bit number; one from `random` if there is none.

        Raises:
            TypeError: It isn't an integer.
        """
        seed = random.randrange(2**32) if self.seed is None else self.seed
        if not is_integer(seed):
            raise TypeError(f"`seed` must be an integer. Received: {seed!r}")
        return np.uint32(int(seed) % 2**32)


def takes_options(*left_out):
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
        def with_options(self, *arguments, **named):
            given = signature.bind(self, *arguments, **named).arguments
            self, inputs = (given.pop(parameter.name) for parameter in own)
            return method(self, inputs, GenerateOptions(**given))

        with_options.__signature__ = signature
        with_options.__doc__ = documented(method.__doc__, [f.name for f in taken])
        return with_options

    return decorate


def documented(docstring, names):
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
