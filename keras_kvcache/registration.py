"""Lets Keras know the package's classes wherever it may be asked to load one.

`keras.saving.load_model` finds a class of another package only if its module was
imported, which registers it. Importing all these modules with the package would import
Keras and JAX, too, which take seconds. So they are imported once Keras is.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder

# These, and the modules that they import, register all classes and loaders of presets.
MODULES = ("models", "hub", "hub.accelerate")


def register_with_keras(folders: Sequence[str]) -> None:
    """Imports the package's classes: now if Keras is there already, else after it.

    Args:
        folders: Names of the package's folders that import Keras. After the first one
            that is imported, all classes are.
    """
    if "keras" in sys.modules:
        _import_all()
    else:
        names = {"keras", *(f"keras_kvcache.{folder}" for folder in folders)}
        sys.meta_path.insert(0, _ImportsClasses(names))


def _import_all():
    for module in MODULES:
        importlib.import_module(f"keras_kvcache.{module}")


class _ImportsClasses(MetaPathFinder):
    """Imports the package's classes right after the first of some modules."""

    def __init__(self, names):
        self._names = names
        self._is_searching = False

    def find_spec(self, name, path=None, target=None):
        """The spec that other finders give; running its module imports the classes."""
        if name not in self._names or self._is_searching:
            return None
        self._is_searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_import(module):
                # Only now: whoever looks for a spec alone must import nothing.
                is_first = self in sys.meta_path
                if is_first:
                    sys.meta_path.remove(self)
                run(module)
                if is_first:
                    _import_all()

            spec.loader.exec_module = run_then_import
        return spec
