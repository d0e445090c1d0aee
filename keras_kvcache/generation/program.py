"""Making a compiled program of a function that reads a model's weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy as np

from keras_kvcache.runtime.platform import compiler_options


def make_program(
    function: Callable,
    model: Any,
    donate: Sequence[str] = (),
    static: Sequence[str] = (),
) -> Callable:
    """A function that runs compiled on JAX, and as it is elsewhere.

    Args:
        function: A pure function of tensors and pytrees that uses the weights of
            `model`.
        model: A `keras.Model`. Its weights are arguments of the program: closed
            over they would become constants of it, copied into it and out of
            date after the next training step.
        donate: Names of arguments whose buffers the program may reuse.
        static: Names of arguments that are part of the program.

    Returns:
        A function with the arguments of `function`, to be given by name. Its `bind`
        takes some of them and gives a function of the others that holds these and
        the weights on the device, for many calls of a short program. On JAX its
        `lower` gives what `jax.jit` lowers it to, for a look at the program.
    """
    if keras.backend.backend() != "jax":
        return _make_eager(function)

    @functools.partial(
        jax.jit,
        donate_argnames=donate,
        static_argnames=static,
        compiler_options=compiler_options(),
    )
    def program(weights, **arguments):
        mapping = list(zip(model.variables, weights, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return function(**arguments)

    def weights():
        return weights_of(model)

    def run(**arguments):
        return program(weights(), **arguments)

    def bind(**bound):
        held, bound = weights(), jax.device_put(bound)

        def run_with_held(**arguments):
            nonlocal held
            try:
                return program(held, **bound, **arguments)
            except (RuntimeError, ValueError):
                # Training gives the buffers of earlier weights away. What is given
                # to the program is lost only once all of it is found to be there.
                if not any(weight.is_deleted() for weight in held):
                    raise
            held = weights()
            return program(held, **bound, **arguments)

        return run_with_held

    run.bind = bind
    run.lower = lambda **arguments: program.lower(weights(), **arguments)
    return run


def weights_of(model: Any) -> list[Any]:
    """The values of a model's variables, those that a running `fit` holds included.

    Within an epoch Keras' trainer on JAX holds the values, and the variables have none.
    `jax_state_sync` gives them back, as Keras does for a callback's `self.model`.

    Args:
        model: A `keras.Model`.

    Raises:
        RuntimeError: A model that this one is part of is being trained and holds them.
    """
    model.jax_state_sync()
    try:
        return [variable.value for variable in model.variables]
    except TypeError as error:
        raise RuntimeError(
            "`model` must have its weights, but a model that it is a part of is being "
            "trained and holds them until the epoch ends. Call that model's "
            f"`jax_state_sync()` before. Received: {model.name!r}"
        ) from error


def _make_eager(function):
    """Runs `function` as it is, without gradients, on the backend's tensors."""
    if keras.backend.backend() == "torch":
        import torch

        function = torch.no_grad()(function)

    def convert(leaf):
        is_array = isinstance(leaf, (np.ndarray, np.generic))
        return keras.ops.convert_to_tensor(leaf) if is_array else leaf

    def run(**arguments):
        return function(**jax.tree_util.tree_map(convert, arguments))

    def bind(**bound):
        return functools.partial(run, **jax.tree_util.tree_map(convert, bound))

    run.bind = bind
    return run
