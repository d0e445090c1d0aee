"""Turns the argument `sampler` into a sampler."""

import jax

from keras_kvcache.samplers import recipes
from keras_kvcache.samplers.hub import HubSampler, is_hub_sampler
from keras_kvcache.samplers.stateful import Constant, has_state

_RECIPES = {
    "greedy": recipes.greedy,
    "random": recipes.random,
    "top_k": recipes.top_k,
    "top_p": recipes.top_p,
    "min_p": recipes.min_p,
}


def get(identifier):
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
        return recipes.greedy()
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
            "sampler, or a function of (logits, seed). "
            f"Received: {identifier!r} of type {type(identifier).__name__}"
        )
    if jax.tree_util.all_leaves([identifier]):
        if has_state(identifier):
            return Constant(identifier)
        return jax.tree_util.Partial(identifier)
    return identifier
