"""A sampler: filters in order, then a draw."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from keras_kvcache.samplers.draws import categorical, most_likely
from keras_kvcache.samplers.filters import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    scale_temperature,
)

# What `samplers.make` calls the parameters of these filters, in its order.
_SETTINGS = {
    scale_temperature: "temperature",
    keep_top_k: "top_k",
    keep_top_p: "top_p",
    keep_min_p: "min_p",
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parameters"],
    meta_fields=["filters", "draw"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Sampler:
    """Turns logits into token ids; built by `chain` and the recipes.

    To JAX it is a pytree: which filters and which draw are part of a compiled
    program, the parameters are inputs of it. A jitted function that takes a
    sampler compiles once for all temperatures.

    Attributes:
        filters: Functions `(logits, parameter) -> logits`, applied in order.
        parameters: One number or tensor for each filter.
        draw: Function `(logits, seed) -> token ids`.
    """

    filters: tuple[Callable, ...]
    parameters: tuple
    draw: Callable

    def __call__(self, logits, seed):
        """Draws one token a row.

        Args:
            logits: Float tensor `(B, V)`.
            seed: Integer, two integers `(seed, step)`, traced or not, or a key a row,
                int32 `(B, 3)`.

        Returns:
            Token ids, an int32 tensor `(B,)`.
        """
        return self.draw(self.filter(logits), seed)

    def filter(self, logits: Any) -> Any:
        """Logits `(B, V)` after all filters."""
        for keep, parameter in zip(self.filters, self.parameters, strict=True):
            logits = keep(logits, parameter)
        return logits

    def __repr__(self):
        """The shortest call that makes the sampler."""
        steps = list(zip(self.filters, self.parameters, strict=True))
        if not steps and self.draw is most_likely:
            return "samplers.greedy()"
        in_order = [keep for keep in _SETTINGS if keep in self.filters]
        if self.draw is categorical and self.filters == tuple(in_order) != ():
            settings = [f"{_SETTINGS[keep]}={_shown(value)}" for keep, value in steps]
            return f"samplers.make({', '.join(settings)})"
        shown = [f"({_name(keep)}, {_shown(value)})" for keep, value in steps]
        shown += [f"draw={_name(self.draw)}"] * (self.draw is not categorical)
        return f"samplers.chain({', '.join(shown)})"


def _shown(parameter):
    """A number as it is; a tensor by its shape and dtype."""
    shape = getattr(parameter, "shape", None)
    if shape is None:
        return repr(parameter)
    return f"<tensor {tuple(shape)} {getattr(parameter, 'dtype', '')}>"


def _name(function):
    return getattr(function, "__name__", repr(function))


def chain(
    *steps: tuple[Callable[..., Any], Any], draw: Callable[..., Any] = categorical
) -> Sampler:
    """Builds a sampler from any filters.

    Example:

    ```python
    sampler = chain((scale_temperature, 0.7), (keep_top_k, 40), (ban, token_id))
    ```

    Args:
        *steps: Pairs `(filter, parameter)`, applied in this order. A filter is
            a function `(logits, parameter) -> logits` with logits `(B, V)`.
            It gets the parameter as given; to JAX the int 1 and the float 1.0
            are two types, each with a compilation of its own.
        draw: Function `(logits, seed) -> token ids (B,)`.

    Returns:
        A `Sampler`.
    """
    filters = tuple(keep for keep, _ in steps)
    parameters = tuple(parameter for _, parameter in steps)
    return Sampler(filters, parameters, draw)
