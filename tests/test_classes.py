"""Classes of the package read what they or their bases declare, and nothing else."""

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap

import pytest

import keras_kvcache


def classes():
    """The package's own classes, by their names."""
    found = {}
    for module in pkgutil.walk_packages(keras_kvcache.__path__, "keras_kvcache."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and value.__module__.startswith("keras_kvcache"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


@functools.cache
def attributes(cls):
    """Names that a class's own code reads of `self`, and those that it sets."""
    if cls.__module__ == "builtins":
        return set(), set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except OSError:  # of a class that a program made, such as a `NamedTuple`'s base
        return set(), set()
    read, written = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "self":
                is_read = isinstance(node.ctx, ast.Load)
                (read if is_read else written).add(node.attr)
    return read, written


def undeclared(cls):
    """What a class reads of `self` although neither it nor a base of it has it."""
    declared = set(dir(cls))
    for base in cls.__mro__:
        declared |= attributes(base)[1] | vars(base).get("__annotations__", {}).keys()
    return sorted(attributes(cls)[0] - declared)


def test_no_class_reads_what_only_a_subclass_has():
    found = {name: undeclared(cls) for name, cls in classes().items()}
    assert len(found) > 50
    assert {name: names for name, names in found.items() if names} == {}


class Base:
    here: int

    def __init__(self):
        self.there = 1


class Mixin:
    def method(self):
        return self.here + self.there


def test_one_that_did_would_be_found():
    assert undeclared(Mixin) == ["here", "there"]

    class Declared(Base):
        def method(self):
            return self.here + self.there

    assert undeclared(Declared) == []


@pytest.mark.parametrize("name", ["DecoderLM", "EncoderDecoderLM"])
def test_models_say_what_they_are_made_of(name):
    """The constructor's signature has each field of the config, with its default."""
    cls = getattr(keras_kvcache, name)
    shown = inspect.signature(cls.__init__).parameters
    config = inspect.get_annotations(cls)["config"]
    for field in inspect.signature(config).parameters.values():
        assert shown[field.name].default == field.default
        assert field.name in cls.__doc__
    assert {"tokenizer", "parts"} <= shown.keys()
