"""keras-hub's layers as parts of ours: adapters for those that are called otherwise."""

from typing import Any

import keras

from keras_kvcache.families import KerasHub
from keras_kvcache.hub.expert_bank import ExpertBank
from keras_kvcache.hub.head_projections import HeadProjection, OutputProjection
from keras_kvcache.hub.position_table import PositionTable


def block_parts(family: KerasHub, block: Any) -> dict[str, Any]:
    """The parts that a `DecoderBlock` of ours computes with.

    Args:
        family: Of the backbone.
        block: A layer of the backbone.
    """
    parts = dict(family.block_parts(block))
    for name in ("attention", "cross_attention"):
        if name in parts:
            projections = parts[name].items()
            parts[name] = {role: _projection(role, one) for role, one in projections}
    feedforward = parts["feedforward"]
    if "experts" in feedforward:
        experts = ExpertBank(feedforward["experts"])
        parts["feedforward"] = dict(feedforward, experts=experts)
    return parts


def model_parts(family: KerasHub, backbone: Any) -> dict[str, Any]:
    """The parts around the blocks, other than those that all backbones name alike.

    Args:
        family: Of the backbone.
        backbone: A `keras_hub.models.Backbone`.
    """
    parts = dict(family.model_parts(backbone))
    if "position_table" in parts:
        parts["position_table"] = PositionTable(parts["position_table"])
    return parts


def _projection(role, layer):
    if role == "output_dense":
        return OutputProjection(layer)
    return HeadProjection(layer) if _has_kernel_by_head(layer) else layer


def _has_kernel_by_head(layer):
    """Whether a kernel `(D, N, H)` is stored as `(N, D, H)`."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return False
    inputs, kernel = layer.equation.split("->")[0].split(",")
    return kernel[0] not in inputs
