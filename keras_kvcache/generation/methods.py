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
    """Gives one that passes its `**options` to `method` the signature of that.

    A line `{options}` of its docstring is replaced by what they mean.
    """

    def decorate(function):
        signature = inspect.signature(method)
        names = list(signature.parameters)

        @functools.wraps(function)
        def with_options(*arguments, **named):
            given = signature.bind(*arguments, **named).arguments
            own = [given.pop(name) for name in names[:2]]
            return function(*own, **given)

        with_options.__signature__ = signature
        with_options.__doc__ = documented(function.__doc__, names)
        return with_options

    return decorate
