"""The usual samplers, and how the argument `sampler` names one.

Temperature comes first, then top-k, top-p and min-p, the order in which
Hugging Face transformers applies them: settings published with a model then
mean here what they mean there. Each filter sees the probabilities among the
tokens that the ones before it kept.

Any parameter may also be a tensor, traced or one value a row `(B, 1)`; only
numbers are checked.
"""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from keras import ops

from keras_kvcache.samplers.draws import most_likely
from keras_kvcache.samplers.filters import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    scale_temperature,
)
from keras_kvcache.samplers.hub import HubSampler, is_hub_sampler
from keras_kvcache.samplers.sampler import Sampler, chain
from keras_kvcache.samplers.stateful import Constant, has_state

# Dividing a logit by less than this could overflow float32.
_MIN_TEMPERATURE = 1e-6


def greedy() -> Sampler:
    """Always the most likely token."""
    return chain(draw=most_likely)


def random(temperature: float | Any = 1.0) -> Sampler:
    """Any token, with its probability at this temperature.

    Args:
        temperature: Float, at least 1e-6. `make` takes 0 for greedy.

    Returns:
        A `Sampler`.

    Raises:
        ValueError: A parameter is out of range, here and in all recipes.
    """
    return chain(_temperature(temperature))


def top_k(k: int | Any = 5, temperature: float | Any = 1.0) -> Sampler:
    """One of the `k` most likely tokens (`keep_top_k`).

    Args:
        k: Integer, at least 1.
        temperature: Float, at least 1e-6.

    Returns:
        A `Sampler`.
    """
    return chain(_temperature(temperature), _top_k(k, "k"))


def top_p(
    p: float | Any = 0.9, temperature: float | Any = 1.0, k: int | Any | None = None
) -> Sampler:
    """One of the most likely tokens that together reach `p` (`keep_top_p`).

    Args:
        p: Float, above 0 and at most 1.
        temperature: Float, at least 1e-6.
        k: Integer, at least 1: first keeps this many. All, if `None`.

    Returns:
        A `Sampler`.
    """
    before = [] if k is None else [_top_k(k, "k")]
    return chain(_temperature(temperature), *before, _top_p(p, "p"))


def min_p(p: float | Any = 0.1, temperature: float | Any = 1.0) -> Sampler:
    """One of the tokens at least `p` times as likely as the most likely one.

    Args:
        p: Float, from 0 to 1.
        temperature: Float, at least 1e-6.

    Returns:
        A `Sampler`.
    """
    return chain(_temperature(temperature), _min_p(p, "p"))


def make(
    temperature: float | Any = 1.0,
    top_k: int | Any | None = None,
    top_p: float | Any | None = None,
    min_p: float | Any | None = None,
) -> Sampler:
    """Builds a sampler from keyword settings; a filter left out isn't run.

    Args:
        temperature: Float. 0 stands for greedy, whatever the other settings.
        top_k: Integer, at least 1.
        top_p: Float, above 0 and at most 1.
        min_p: Float, from 0 to 1.

    Returns:
        A `Sampler`.
    """
    steps = []
    if top_k is not None:
        steps.append(_top_k(top_k, "top_k"))
    if top_p is not None:
        steps.append(_top_p(top_p, "top_p"))
    if min_p is not None:
        steps.append(_min_p(min_p, "min_p"))
    if isinstance(temperature, numbers.Real) and temperature == 0:
        return greedy()
    return chain(_temperature(temperature), *steps)


def _temperature(value):
    rule = f"at least {_MIN_TEMPERATURE} (for greedy decoding use `samplers.greedy()`)"
    value = _checked(
        "temperature", value, lambda t: _MIN_TEMPERATURE <= t < float("inf"), rule
    )
    return scale_temperature, value


def _top_k(value, name):
    rule = "a whole number from 1 on"
    return keep_top_k, _checked(name, value, lambda k: k >= 1 and k % 1 == 0, rule)


def _top_p(value, name):
    rule = "above 0 and at most 1"
    return keep_top_p, _checked(name, value, lambda p: 0 < p <= 1, rule)


def _min_p(value, name):
    return keep_min_p, _checked(name, value, lambda p: 0 <= p <= 1, "from 0 to 1")


def _checked(name, value, in_range, rule):
    if ops.is_tensor(value) or isinstance(value, np.ndarray):
        return value
    if not (isinstance(value, numbers.Real) and in_range(value)):
        raise ValueError(f"`{name}` must be {rule}. Received: {value!r}")
    # One type for all numbers: JAX would compile anew for 1 after 1.0.
    return float(value)


_RECIPES = {recipe.__name__: recipe for recipe in (greedy, random, top_k, top_p, min_p)}


def get(identifier: Any) -> Callable[..., Any]:
    """Finds the sampler that `identifier` stands for.

    Whatever comes back is a pytree, so a jitted function can take it as an
    argument.

    Args:
        identifier: `None` for greedy; the name of a recipe, made with its
            defaults; a `Sampler`; an instance of a keras-hub sampler or of
            your own subclass of one; a sampler with state, as
            `keras_kvcache.samplers.stateful` describes it; or any function
            `(logits (B, V), seed) -> token ids (B,)`. Generation calls the last, and
            those of keras-hub, row by row, with one row's logits and seed.

    Returns:
        A callable `(logits, seed) -> token ids`, or the sampler with state.

    Raises:
        ValueError: The name is unknown, or a keras-hub sampler has a decoding loop
            of its own.
        TypeError: It is none of these.
    """
    if identifier is None:
        return greedy()
    if isinstance(identifier, str):
        if identifier not in _RECIPES:
            raise ValueError(
                f"`sampler` must be one of the names {', '.join(_RECIPES)}. "
                f"Received: {identifier!r}"
            )
        return _RECIPES[identifier]()
    if is_hub_sampler(identifier):
        return HubSampler(identifier)
    # A class or a recipe is callable too, but gives a sampler, not tokens.
    is_recipe = any(identifier is recipe for recipe in _RECIPES.values())
    if is_recipe or isinstance(identifier, type) or not callable(identifier):
        raise TypeError(
            f"`sampler` must be one of the names {', '.join(_RECIPES)}, a sampler "
            "made by a function of `samplers`, an instance of a keras-hub "
            "sampler, a function of (logits, seed), or an object with a `start`. "
            f"Received: {identifier!r} of type {type(identifier).__name__}"
        )
    if jax.tree_util.all_leaves([identifier]):
        if has_state(identifier):
            return Constant(identifier)
        return jax.tree_util.Partial(identifier)
    return identifier
