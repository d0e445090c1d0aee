"""Samplers: logits `(B, V)` and a seed to token ids `(B,)`.

A sampler is any callable `sampler(logits, seed) -> ids`, or an object with a state, as
`samplers.stateful` says. The ones made here
are a list of filters and a draw, compile once for all values of their
parameters, and see the same noise for the same seed on every backend.
"""

from keras_kvcache.samplers.draws import categorical, most_likely
from keras_kvcache.samplers.filters import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    scale_temperature,
)
from keras_kvcache.samplers.recipes import (
    get,
    greedy,
    make,
    min_p,
    random,
    top_k,
    top_p,
)
from keras_kvcache.samplers.sampler import Sampler, chain

__all__ = [
    "Sampler",
    "categorical",
    "chain",
    "get",
    "greedy",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "make",
    "min_p",
    "most_likely",
    "random",
    "scale_temperature",
    "top_k",
    "top_p",
]
