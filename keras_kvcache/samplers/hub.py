"""keras-hub's samplers as samplers of this package.

This imports no keras-hub: the caller, who has one of its samplers, already did.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import keras
from keras import ops

from keras_kvcache.samplers.draws import seed_words, threefry


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["sampler"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class HubSampler:
    """Calls a keras-hub sampler one token at a time, as a pure function.

    A keras-hub sampler keeps its random state in variables and moves it on at
    each draw. Here every call starts from a state made of the given seed and
    throws the moved one away, so the wrapped sampler is never changed.

    To JAX it is a pytree without leaves: the wrapped sampler's settings are
    constants of the compiled program, and changing them afterwards has no
    effect on it. Make a new sampler instead.

    Attributes:
        sampler: A `keras_hub.samplers.Sampler` that `is_hub_sampler` knows.

    Raises:
        ValueError: The sampler runs a decoding loop of its own, as beam,
            contrastive and speculative search do.
    """

    sampler: object

    def __post_init__(self):
        if not chooses_stepwise(self.sampler):
            raise ValueError(
                "A keras-hub `sampler` must choose each token in "
                "`get_next_token`, without a `__call__` of its own: it is the "
                "generation loop that calls the model here. Received: "
                f"{type(self.sampler).__name__}"
            )

    def __repr__(self):
        settings = getattr(self.sampler, "get_config", dict)()
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return f"{type(self).__name__}({type(self.sampler).__name__}({shown}))"

    def __call__(self, logits, seed):
        """Draws one token a row: logits `(B, V)` and a seed to int32 ids `(B,)`."""
        states = [
            (variable, _generator_state(seed, i, variable.dtype))
            for i, variable in enumerate(self.sampler.variables)
        ]
        with keras.StatelessScope(state_mapping=states):
            probabilities = self.sampler.compute_probabilities(logits)
            ids = self.sampler.get_next_token(probabilities)
        return ops.cast(ids, "int32")


def hub_samplers() -> Any:
    """The module `keras_hub.samplers`; `None` where nobody has imported it."""
    return sys.modules.get("keras_hub.samplers")


def is_hub_sampler(value: Any) -> bool:
    """Whether `value` is an instance of `keras_hub.samplers.Sampler`."""
    hub = hub_samplers()
    return hub is not None and isinstance(value, hub.Sampler)


def chooses_stepwise(hub_sampler: Any) -> bool:
    """Whether a keras-hub sampler leaves the loop to `keras_hub.samplers.Sampler`."""
    return type(hub_sampler).__call__ is hub_samplers().Sampler.__call__


def _generator_state(seed, i, dtype):
    # Hashed, because Keras on PyTorch adds the two words of a state, and a
    # plain (seed, step) would repeat itself in the next seed.
    key = seed_words(seed)
    zero = ops.zeros_like(key[0])
    return ops.cast(ops.stack(threefry(key, (zero + i, zero))), dtype)
