"""Small models of each family, with what the family has switched on: one file a family.

A file has the name of its family's in `keras_kvcache/families`, and as many of these
tables as the family can be read from. Keys are names of cases, which tests show.

    TRANSFORMERS: Case to the beginning of transformers' class names and a config.
    DETAILS: Cases of these of which only logits are compared: they differ from another
        in a detail.
    HUB: Case to the beginning of keras-hub's class names and a backbone's arguments.
    HUB_PAIRS, HUB_REFUSED: The same of encoder-decoders, and of what is refused.
    GGUF: Architecture to the tensors that its blocks have beside Llama's, and the
        sizes whose product is theirs.
"""

import importlib
import pkgutil


def modules():
    """By the name of the file."""
    names = [file.name for file in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def collect(table):
    """The cases of all families in one table."""
    cases = {}
    for module in modules().values():
        cases.update(getattr(module, table, {}))
    return cases
