"""`generate` and `stream` as methods of a model."""

import functools
import inspect

from keras_kvcache.generation.generator import Generator


def _as_method(method):
    """A method of `Generator` as one of a model, with the same documentation."""

    @functools.wraps(method)
    def of_model(self, *arguments, **options):
        return method(self.generator, *arguments, **options)

    of_model.__qualname__ = f"GenerateMethods.{method.__name__}"
    return of_model


def takes_options_of(method):
    """Shows the signature of `method` on one that passes its `**options` to it."""

    def decorate(function):
        function.__signature__ = inspect.signature(method)
        return function

    return decorate


class GenerateMethods:
    """Gives a model the methods of its `generator`, a `Generator`."""

    generate = _as_method(Generator.generate)
    stream = _as_method(Generator.stream)
