"""The two normalizations that decoders use."""

import keras

NORMALIZATIONS = {
    "rms_norm": keras.layers.RMSNormalization,
    "layer_norm": keras.layers.LayerNormalization,
}


def make_normalization(kind, epsilon, name, dtype):
    """A normalization layer over the last axis.

    Args:
        kind: `"rms_norm"` (Zhang and Sennrich, 2019,
            https://arxiv.org/abs/1910.07467) or `"layer_norm"`.
        epsilon: Added to the mean square or the variance.
        name: Name of the layer.
        dtype: Its dtype policy.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(
            f"`normalization` must be one of {list(NORMALIZATIONS)}. Received: {kind!r}"
        )
    return NORMALIZATIONS[kind](epsilon=epsilon, name=name, dtype=dtype)
