"""Decoder blocks as programs, on backends that don't compile a whole decode loop."""

import json

import jax
import keras
from keras import ops

from keras_kvcache.ops import can_trace, trace


def run_block(block, x, **arguments):
    """Calls a block, whose arguments these are."""
    return block(x, **arguments)


class BlockPrograms:
    """Runs steps of one token by programs, each traced once for blocks that are alike.

    Called as `run_block` and with what it returns, but that the self-attention cache
    is given away: its arrays may be those that come back. A block that can't be traced
    is called as it is, and so are all blocks for more than one token, as each number
    of tokens would be a program, and where the backend is JAX.
    """

    def __init__(self):
        self._programs, self._descriptions = {}, {}

    def __call__(self, block, x, **arguments):
        """Calls a block; see the class."""
        if not can_trace() or x.shape[1] != 1:
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
        """What tells blocks apart but for their weights, which may be known by shape.

        Of a block with layers of another model that is the block itself.
        """
        if id(block) not in self._descriptions:
            description = block
            if not block._parts:
                config = block.get_config()
                for name in ("name", "kernel_initializer"):
                    config.pop(name)
                description = (json.dumps(config, sort_keys=True), block.activation)
            self._descriptions[id(block)] = (block, description)
        return self._descriptions[id(block)][1]


def _trace_block(block, tensors, structure):
    """The program of a block and the structure of what it returns, `None`s if none."""
    variables, returned = list(block.variables), None

    def function(*tensors):
        nonlocal returned
        count = len(variables)
        mapping = list(zip(variables, tensors[:count], strict=True))
        x, arguments = jax.tree_util.tree_unflatten(structure, tensors[count:])
        with keras.StatelessScope(state_mapping=mapping):
            outputs = block(x, **arguments)
        leaves, returned = jax.tree_util.tree_flatten(outputs)
        return tuple(leaves)

    # Of each leaf the number of the argument, to find those of the cache by name.
    numbers = range(len(variables), len(tensors))
    _, arguments = jax.tree_util.tree_unflatten(structure, numbers)
    donated = jax.tree_util.tree_leaves(arguments.get("self_attention_cache"))
    try:
        return trace(function, tensors, donated), returned
    except Exception:  # A layer of somebody else's may depend on values, say.
        return None, None
