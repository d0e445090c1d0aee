"""Multi-head attention once more, in NumPy and float64, one query at a time.

Slow and plain, so that it is right at a glance. The tests compare with it.
"""

import numpy as np


def rotate(x, position, base=10000.0, rotary_dim=None, scaling=1.0, factors=None):
    """Rotates pairs `(j, j + half)` of a vector, as complex numbers."""
    half = (rotary_dim or len(x)) // 2
    frequency = base ** (-np.arange(half) / half)
    frequency = frequency / (1.0 if factors is None else np.asarray(factors))
    turned = x[:half] + 1j * x[half : 2 * half]
    turned = turned * np.exp(1j * position / scaling * frequency)
    return np.concatenate([turned.real, turned.imag, x[2 * half :]])


def rms_norm(x, gain, epsilon):
    """A vector over its root mean square."""
    return x / np.sqrt(np.mean(x**2) + epsilon) * gain


def softmax(scores, visible, sink=None):
    """Weights that sum to one over the visible scores; zeros if there are none.

    With a sink they sum to less: it is one more score, whose weight isn't returned.
    """
    weights = np.zeros(len(scores))
    if visible.any():
        seen = scores[visible] if sink is None else [*scores[visible], sink]
        shifted = np.exp(seen - np.max(seen))
        weights[visible] = (shifted / shifted.sum())[: visible.sum()]
    return weights


def attend(
    query,
    keys,
    values,
    scale,
    causal=False,
    window=None,
    soft_cap=None,
    mask=None,
    positions=None,
    bias=None,
    sink=None,
):
    """Attention of one row.

    Args:
        query: `(T, N, H)`.
        keys: `(S, K, H)`; key `s` stands at position `s`.
        values: `(S, K, Hv)`.
        scale: Factor of the scores.
        causal: Whether later keys are hidden.
        window: Keys this far away or farther are hidden.
        soft_cap: Soft cap of the scores.
        mask: Boolean `(N, T, S)`.
        positions: Position of each query; `None` for 0, 1, 2, …
        bias: Table `(N, distances)` added to scores by how far a key stands before the
            query, or a function of head, position of the query and key.
        sink: Logits `(N,)`, or `None`.

    Returns:
        `(T, N, Hv)` and the weights `(N, T, S)`.
    """
    length, heads, _ = query.shape
    slots, group = np.arange(len(keys)), heads // keys.shape[1]
    output = np.zeros((length, heads, values.shape[-1]))
    weights = np.zeros((heads, length, len(keys)))
    for t, position in enumerate(range(length) if positions is None else positions):
        for n in range(heads):
            k, v = keys[:, n // group], values[:, n // group]
            scores = k @ query[t, n] * scale
            if soft_cap:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if callable(bias):
                scores = scores + [bias(n, position, slot) for slot in slots]
            elif bias is not None:
                last = len(bias[n]) - 1
                distances = [min(max(position - slot, 0), last) for slot in slots]
                scores = scores + [bias[n][distance] for distance in distances]
            visible = np.ones(len(keys), bool)
            if causal:
                visible &= slots <= position
            if window:
                visible &= abs(slots - position) < window
            if mask is not None:
                visible &= mask[n, t]
            weights[n, t] = softmax(scores, visible, None if sink is None else sink[n])
            output[t, n] = weights[n, t] @ v
    return output, weights


def layer_weights(layer):
    """A layer's weights by the name of their owner: `{"query": [kernel, bias]}`."""
    named = {}
    for weight in layer.weights:
        owner = weight.path.split("/")[-2]
        array = np.asarray(weight.numpy(), "float64")
        named.setdefault(owner, []).append(array)
    return named


def multi_head_attention(layer, query, value, key=None, rotary=None, **rules):
    """What a `CachedMultiHeadAttention` should make of whole sequences.

    Args:
        layer: The layer, built; its weights and sizes are used, not its code.
        query: `(B, T, D)`.
        value: `(B, S, D)`.
        key: `(B, S, D)` or `None`.
        rotary: Arguments of `rotate`, or `None` for no rotation.
        **rules: `causal`, `window`, `soft_cap`, `bias`, `sink` and `mask` (`(B, N, T,
            S)`) of `attend`.

    Returns:
        `(B, T, D)` and the weights `(B, N, T, S)`.
    """
    weights = layer_weights(layer)
    masks = rules.pop("mask", None)
    scale = layer.query_scale or layer.key_dim**-0.5

    def project(name, x):
        kernel, *bias = weights[name]
        return np.einsum("td,dnh->tnh", x, kernel) + (bias[0] if bias else 0.0)

    def prepare(name, x):
        x = project(name, x)
        norm = getattr(layer, f"{name}_norm")
        if norm is not None:
            gain = weights[norm.name][0]
            x = np.apply_along_axis(rms_norm, -1, x, gain, norm.epsilon)
        if rotary is not None:
            x = np.stack(
                [
                    np.apply_along_axis(rotate, -1, heads, position, **rotary)
                    for position, heads in enumerate(x)
                ]
            )
        return x

    outputs, all_weights = [], []
    for row in range(len(query)):
        q, v = np.float64(query[row]), np.float64(value[row])
        k = v if key is None else np.float64(key[row])
        mask = None if masks is None else masks[row]
        output, attended = attend(
            prepare("query", q),
            prepare("key", k),
            project("value", v),
            scale,
            mask=mask,
            **rules,
        )
        if "gate" in weights:
            output = output / (1.0 + np.exp(-project("gate", q)))
        kernel, *bias = weights["attention_output"]
        output = np.einsum("tnh,nhd->td", output, kernel)
        outputs.append(output + (bias[0] if bias else 0.0))
        all_weights.append(attended)
    return np.stack(outputs), np.stack(all_weights)
