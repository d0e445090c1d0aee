"""Families of models: one file a family.

Nothing else names a family: whoever reads a model asks here, and finds the files by
looking into this folder.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from keras_kvcache.families.family import Family, Gguf, HuggingFace, KerasHub

__all__ = [
    "Family",
    "Gguf",
    "HuggingFace",
    "KerasHub",
    "all_families",
    "gguf_families",
    "hugging_face_families",
    "keras_hub_families",
]


@functools.cache
def all_families() -> dict[str, Family]:
    """The `FAMILY` of each file of this folder that has one, by the file's name."""
    files = sorted(file.name for file in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in files}
    return {
        name: module.FAMILY
        for name, module in modules.items()
        if hasattr(module, "FAMILY")
    }


def hugging_face_families() -> dict[str, HuggingFace]:
    """By `model_type`."""
    families = all_families().values()
    return {one.model_type: one for family in families for one in family.hugging_face}


def gguf_families() -> dict[str, Gguf]:
    """By `general.architecture`."""
    families = all_families().values()
    return {one.architecture: one for family in families for one in family.gguf}


def keras_hub_families() -> dict[str, KerasHub]:
    """By the name of the backbone's class."""
    families = all_families().values()
    return {one.backbone: one for family in families for one in family.keras_hub}
