"""Methods of a `Generator` as methods of the model that has it."""

import functools
import inspect

from keras_kvcache.generation.options import documented


def as_method(method):
    """A method of `Generator` as one of a model that has a `generator`.

    Signature and documentation are the same.
    """

    @functools.wraps(method)
    def of_model(self, *arguments, **options):
        return method(self.generator, *arguments, **options)

    return of_model


def takes_options_of(method):
    """Shows the signature of `method` on one that passes its `**options` to it.

    A line `{options}` of its docstring is replaced by what they mean.
    """

    def decorate(function):
        function.__signature__ = inspect.signature(method)
        names = list(function.__signature__.parameters)
        function.__doc__ = documented(function.__doc__, names)
        return function

    return decorate
