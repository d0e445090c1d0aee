"""A model's weights copied out of layers that it shares."""

from operator import attrgetter

import keras

from keras_kvcache.models.decoder_lm import DecoderLM
from keras_kvcache.models.hub.projections import Projection

MODEL_PARTS = ("token_embedding", "position_table", "final_norm")
BLOCK_PARTS = (
    "attention_norm",
    "attention._query_dense",
    "attention._key_dense",
    "attention._value_dense",
    "attention._output_dense",
    "attention.query_norm",
    "attention.key_norm",
    "post_attention_norm",
    "feedforward_norm",
    "feedforward.gate",
    "feedforward.intermediate",
    "feedforward.output_dense",
    "feedforward.router",
    "feedforward.experts",
    "post_ffw_norm",
)


def own_copy(model):
    """A `DecoderLM` that equals a model made of foreign layers.

    Args:
        model: A `DecoderLM` whose parts come from elsewhere.

    Returns:
        A `DecoderLM` with weights of its own and the same tokenizer. What LoRA
        added is merged in.

    Raises:
        ValueError: A layer is quantized.
    """
    copy = DecoderLM.from_config({**model.get_config(), "kernel_initializer": "zeros"})
    copy.tokenizer = model.tokenizer
    copy.kernel_initializer = model.kernel_initializer
    _copy_parts(MODEL_PARTS, copy, model)
    for own, shared in zip(copy.blocks, model.blocks, strict=True):
        _copy_parts(BLOCK_PARTS, own, shared)
    return copy


def _copy_parts(names, to, source):
    for name in names:
        own = _get(to, name)
        if own is not None:
            _copy_layer(own, _get(source, name))


def _get(layer, name):
    """A part of a layer by its path, or `None` if the layer has no such part."""
    try:
        return attrgetter(name)(layer)
    except AttributeError:
        return None


def _copy_layer(own, shared):
    if isinstance(shared, Projection):
        shared = shared.projection
    if getattr(shared, "quantization_mode", None) is not None:
        raise ValueError(
            "A model must not be quantized to be saved with weights of its own; "
            "quantize it after loading. Received: quantization_mode="
            f"{shared.quantization_mode!r} of {shared.path}"
        )
    if hasattr(own, "kernel"):
        own.kernel.assign(_own_layout(shared))
        if own.bias is not None:
            own.bias.assign(shared.bias)
    elif hasattr(own, "embeddings"):
        # Of a position table perhaps not all is wanted.
        own.embeddings.assign(shared.embeddings[: own.embeddings.shape[0]])
        if not getattr(own, "tie_weights", True):
            own.reverse_embeddings.assign(shared.reverse_embeddings)
    else:
        own.set_weights(shared.get_weights())


def _own_layout(layer):
    """A kernel with what is summed over first, as all of ours have it."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return layer.kernel
    operands, output = layer.equation.split("->")
    inputs, kernel = operands.split(",")
    order = [axis for axis in inputs if axis in kernel]
    order += [axis for axis in output if axis in kernel]
    axes = [kernel.index(axis) for axis in order]
    return keras.ops.transpose(layer.kernel, axes)
