"""Samplers that draw as keras-hub's do, and seeds from their random state."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_kvcache.samplers import recipes
from keras_kvcache.samplers.hub import HubSampler, hub_samplers


def stepwise_sampler(hub_sampler: Any) -> Callable:
    """A sampler that draws as a keras-hub sampler does.

    Args:
        hub_sampler: A `keras_hub.samplers.Sampler` that chooses token by token.

    Returns:
        A sampler as `keras_kvcache.samplers.get` gives it.

    Raises:
        ValueError: The sampler has a loop of its own.
    """
    hub, temperature = hub_samplers(), hub_sampler.temperature
    kind = type(hub_sampler)
    # Ours draw from the same distribution, but don't sort the vocabulary.
    if kind is hub.GreedySampler:
        return recipes.greedy()
    if kind is hub.RandomSampler:
        return recipes.random(temperature)
    if kind is hub.TopKSampler:
        return recipes.top_k(hub_sampler.k, temperature)
    if kind is hub.TopPSampler and hub_sampler.k is None and 0 < hub_sampler.p <= 1:
        return recipes.top_p(hub_sampler.p, temperature)
    return HubSampler(hub_sampler)


def next_seed(hub_sampler: Any) -> int:
    """A seed, uint32, that the sampler's random state gives, which moves on."""
    seed = 0
    for state in hub_sampler.variables:
        first, second = (int(word) for word in ops.convert_to_numpy(state))
        state.assign(np.array([first, (second + 1) % 2**32], "uint32"))
        # An odd factor spreads the draws of one seed over all seeds.
        seed += first + second * 0x9E3779B1
    return seed % 2**32
