"""A model's weights copied out of layers that it shares."""

from operator import attrgetter
from typing import Any

import keras

from keras_kvcache.layers.quantization import quantization_of, quantize_layer

# Modes of `quantize` whose layers compute as ever once they are quantized.
QUANTIZATIONS = (None, "int8", "int4", "float8")
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
SCORE_WEIGHTS = ("attention.score_bias_table", "attention.sink_logits")


def own_copy(model: Any) -> Any:
    """A model that equals one made of foreign layers, with weights of its own.

    Args:
        model: A `DecoderLM` whose parts come from elsewhere.

    Returns:
        A model of the same class and config, with the same tokenizer. What LoRA
        added is merged in. Its layers are quantized as the foreign ones, with the
        very same integers and scales.

    Raises:
        ValueError: A layer is quantized in a mode not tried here, has LoRA beside,
            which merged in would be rounded again, or shares int4 scales among other
            weights than a layer here can, as Gemma's do.
    """
    config = {**model.get_config(), "kernel_initializer": "zeros"}
    copy = type(model).from_config(config)
    copy.tokenizer = model.tokenizer
    copy.kernel_initializer = model.kernel_initializer
    _copy_parts(MODEL_PARTS, copy, model)
    for own, shared in zip(copy.blocks, model.blocks, strict=True):
        _copy_parts(BLOCK_PARTS, own, shared)
        for name in SCORE_WEIGHTS:
            if _get(own, name) is not None:
                _get(own, name).assign(_get(shared, name))
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
    # Layers that compute with another layer's weights name it.
    shared = getattr(shared, "source", shared)
    if getattr(shared, "quantization_mode", None) is not None:
        return _copy_quantized(own, shared)
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


def _copy_quantized(own, shared):
    """Quantizes an own layer as a foreign one, and copies its integers and scales."""
    how = quantization_of(shared)
    if shared.quantization_mode not in QUANTIZATIONS:
        modes = ", ".join(QUANTIZATIONS[1:])
        _refuse(shared, f"be quantized in no other mode than {modes}", "another")
    if getattr(shared, "lora_enabled", False):
        _refuse(shared, "have no LoRA in layers that are quantized", "LoRA")
    quantize_layer(own, **how)
    values = {weight.name: weight.value for weight in shared.weights}
    if isinstance(shared, keras.layers.EinsumDense):
        axes = _own_axes(shared)
        if shared.quantization_mode != "int4":
            values["kernel"] = keras.ops.transpose(values["kernel"], axes)
        elif axes != sorted(axes):
            # Keras made it of as many rows as are summed, whichever its axes were.
            rule = "have int4 kernels whose first axes are summed"
            _refuse(shared, rule, shared.equation)
    for weight in own.weights:
        # Scales of an `EinsumDense` have axes of one.
        weight.assign(keras.ops.reshape(values[weight.name], weight.shape))


def _refuse(layer, rule, received):
    raise ValueError(
        f"A model must {rule} to be saved with weights of its own; save the "
        f"keras-hub model. Received: {received} at {layer.path}, "
        f"quantization_mode={layer.quantization_mode!r}"
    )


def _own_layout(layer):
    """A kernel with what is summed over first, as all of ours have it."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return layer.kernel
    return keras.ops.transpose(layer.kernel, _own_axes(layer))


def _own_axes(layer):
    """The axes of an `EinsumDense`'s kernel, in the order that ours have."""
    operands, output = layer.equation.split("->")
    inputs, kernel = operands.split(",")
    order = [axis for axis in inputs if axis in kernel]
    order += [axis for axis in output if axis in kernel]
    return [kernel.index(axis) for axis in order]
