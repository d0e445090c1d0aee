"""Weights from the tensors of a model's files: all checked, then read one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from keras_kvcache.errors import quoted
from keras_kvcache.families.tensors import Source


def check_tensors(
    found: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Source],
    others: Mapping[str, tuple[int, ...]] | None = None,
    ignored: str = "",
) -> None:
    """Refuses files with other tensors than those the model is made of.

    Args:
        found: Shapes of the tensors in the files, by name.
        sources: Of all weights.
        others: Shapes of tensors that are read beside the weights.
        ignored: Pattern of names of tensors that no weight needs.

    Raises:
        ValueError: A tensor is missing, too many or of another shape.
    """
    wanted = dict(others or {})
    for source in sources.values():
        wanted |= dict.fromkeys(source.tensors, source.stored)
        if source.twin in found:
            wanted[source.twin] = source.stored
    _refuse("the model must have these tensors, but hasn't", wanted, found)
    extra = [name for name in found if not re.fullmatch(ignored, name)]
    # One left over (a bias, an adapter) would change the model's answers, so it is
    # never skipped in silence.
    _refuse("it has tensors that the decoder has no place for", extra, wanted)
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"tensor {quoted(name)} must have shape {shape}. Received: "
                f"{found[name]}"
            )


def _refuse(reason: str, names: Collection[str], known: Collection[str]) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        raise ValueError(f"{reason}: {', '.join(missing[:6])}{more}.")


def read_weight(
    source: Source, read_tensor: Callable[[str, Source], np.ndarray]
) -> np.ndarray:
    """One weight, float32, in the decoder's layout.

    Args:
        source: Of the weight.
        read_tensor: Function of a tensor's name and the source that gives that part of
            the tensor, with its last axes in the decoder's order.
    """
    if not source.tensors:
        return np.zeros(source.shape, "float32")
    arrays = [read_tensor(name, source) for name in source.tensors]
    array = np.stack(arrays) if len(arrays) > 1 else arrays[0]
    return array.reshape(source.shape)
