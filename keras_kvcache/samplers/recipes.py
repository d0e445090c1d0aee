"""The usual samplers.

Temperature comes first, then top-k, top-p and min-p, the order in which
Hugging Face transformers applies them: settings published with a model then
mean here what they mean there. Each filter sees the probabilities among the
tokens that the ones before it kept.

Any parameter may also be a tensor, traced or one value a row `(B, 1)`; only
numbers are checked.
"""

import numbers

import numpy as np
from keras import ops

from keras_kvcache.samplers.draws import most_likely
from keras_kvcache.samplers.filters import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    scale_temperature,
)
from keras_kvcache.samplers.sampler import chain

# Dividing a logit by less than this could overflow float32.
_MIN_TEMPERATURE = 1e-6


def greedy():
    """Always the most likely token."""
    return chain(draw=most_likely)


def random(temperature=1.0):
    """Any token, with its probability at this temperature.

    Args:
        temperature: Float, at least 1e-6. `make` takes 0 for greedy.

    Returns:
        A `Sampler`.

    Raises:
        ValueError: A parameter is out of range, here and in all recipes.
    """
    return chain(_temperature(temperature))


def top_k(k=5, temperature=1.0):
    """One of the `k` most likely tokens (`keep_top_k`).

    Args:
        k: Integer, at least 1.
        temperature: Float, at least 1e-6.

    Returns:
        A `Sampler`.
    """
    return chain(_temperature(temperature), _top_k(k, "k"))


def top_p(p=0.9, temperature=1.0, k=None):
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


def min_p(p=0.1, temperature=1.0):
    """One of the tokens at least `p` times as likely as the most likely one.

    Args:
        p: Float, from 0 to 1.
        temperature: Float, at least 1e-6.

    Returns:
        A `Sampler`.
    """
    return chain(_temperature(temperature), _min_p(p, "p"))


def make(temperature=1.0, top_k=None, top_p=None, min_p=None):
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
