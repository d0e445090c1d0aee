"""Decoder blocks as programs, on backends that don't compile a whole decode loop."""

import json
from typing import Any

import jax
import keras
from keras import ops

from keras_kvcache.runtime.tracing import can_trace, trace


def run_block(block: keras.layers.Layer, x: Any, **arguments: Any) -> Any:
    """Calls a block without a program of its own."""
    return block(x, **arguments)


class BlockPrograms:
    """Runs blocks as programs; blocks that are alike share one.

    It is called like `run_block` and returns the same, but the self-attention cache is
    donated: its arrays may be those that come back. A block is called without a program
    on JAX, and if it can't be traced. Each shape of `x` and of the caches has its own
    program, so these must be few, as the chunks and capacities of generation are.
    """

    def __init__(self) -> None:
        self._programs, self._descriptions = {}, {}

    def __call__(self, block: keras.layers.Layer, x: Any, **arguments: Any) -> Any:
        """Calls a block, by its program where there can be one."""
        if not can_trace():
            return block(x, **arguments)
        weights = [ops.convert_to_tensor(weight.value) for weight in block.variables]
        leaves, structure = jax.tree_util.tree_flatten((x, arguments))
        tensors = [*weights, *leaves]
        if not all(map(ops.is_tensor, leaves)):
            return block(x, **arguments)
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        key = (self._describe(block), structure, shapes)
        if key not in self._programs:
            self._programs[key] = _trace_block(block, tensors, structure)
        program, returned = self._programs[key]
        if program is None:
            return block(x, **arguments)
        return jax.tree_util.tree_unflatten(returned, program(*tensors))

    def _describe(self, block):
        """A key: equal for blocks that may share a program if their shapes agree.

        A block that has layers of another model shares none: it is its own key.
        """
        if id(block) not in self._descriptions:
            description = block
            if not block._parts:
                config = block.get_config()
                for name in ("name", "kernel_initializer"):
                    config.pop(name)
                own = (block.activation, block.config.score_bias)
                description = (json.dumps(config, sort_keys=True), *own)
            self._descriptions[id(block)] = (block, description)
        return self._descriptions[id(block)][1]


class ArgumentsOnly(keras.StatelessScope):
    """Variables are arguments of a program, which neither changes nor has others.

    The value of any other variable would be a constant in it.
    """

    def add_update(self, update: Any) -> Any:
        """Refuses that a variable is assigned."""
        raise ValueError(f"A program must assign no variable. Received: {update[0]}")

    def get_current_value(self, variable: Any) -> Any:
        """The argument that a variable is."""
        value = super().get_current_value(variable)
        if value is None:
            raise ValueError(f"A program must use no other. Received: {variable}")
        return value


def _trace_block(block, tensors, structure):
    """A block's program and the structure of its result, or two `None`s."""
    variables, returned = list(block.variables), None

    def function(*tensors):
        nonlocal returned
        count = len(variables)
        mapping = list(zip(variables, tensors[:count], strict=True))
        x, arguments = jax.tree_util.tree_unflatten(structure, tensors[count:])
        with ArgumentsOnly(state_mapping=mapping):
            outputs = block(x, **arguments)
        leaves, returned = jax.tree_util.tree_flatten(outputs)
        return tuple(leaves)

    # In the place of each leaf its argument's number, to know those of the cache.
    numbers = range(len(variables), len(tensors))
    _, arguments = jax.tree_util.tree_unflatten(structure, numbers)
    donated = jax.tree_util.tree_leaves(arguments.get("self_attention_cache"))
    try:
        return trace(function, tensors, donated), returned
    except Exception:  # Such as for a user's layer that reads values.
        return None, None
