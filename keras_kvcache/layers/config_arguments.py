"""Constructors whose arguments are the fields of a dataclass, written once."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any


def shows_fields_of(config_class: type) -> Callable:
    """Decorates an `__init__` that takes a config's fields as `*values, **options`.

    Its signature then names these fields in the place of `*values`.

    Args:
        config_class: The dataclass; `read_config` makes one of the arguments.
    """

    def decorate(init):
        own = inspect.signature(init).parameters.values()
        fields = list(inspect.signature(config_class).parameters.values())
        shown = [fields if each.kind is each.VAR_POSITIONAL else [each] for each in own]
        init.__signature__ = inspect.Signature(itertools.chain(*shown))
        return init

    return decorate


def has_fields_of(config_class: type) -> Callable:
    """Decorates a class whose `config` has fields that are its attributes, too.

    They can't be set: the layers were made of what they were.

    Args:
        config_class: The dataclass. An attribute that the class has already stays.
    """

    def decorate(cls):
        for field in dataclasses.fields(config_class):
            if field.init and not hasattr(cls, field.name):
                setattr(cls, field.name, _field(field.name))
        return cls

    return decorate


def _field(name):
    def get(self):
        return getattr(self.config, name)

    def refuse(self, value):
        raise AttributeError(
            f"`{name}` must be given to the constructor: the layers of this "
            f"{type(self).__name__} are made by its config, which doesn't change. "
            f"Received: {name}={value!r}"
        )

    return property(get, refuse, doc=f"`config.{name}`, which can't be set.")


def read_config(config_class: type, values: tuple, options: dict) -> tuple[Any, dict]:
    """A config of a constructor's arguments, and the arguments that are left.

    Args:
        config_class: The dataclass.
        values: Fields by place.
        options: Fields by name, and other arguments.

    Raises:
        TypeError: A field is missing or given twice, or there are too many values.
    """
    signature = inspect.signature(config_class)
    fields = {name: options[name] for name in signature.parameters if name in options}
    rest = {name: options[name] for name in options.keys() - fields.keys()}
    bound = signature.bind(*values, **fields)
    return config_class(**bound.arguments), rest
