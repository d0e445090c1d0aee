"""The decoder block: its caches, its encoder, its config."""

import attention_cases as cases
import keras
import numpy as np
import pytest
import reference

from keras_kvcache.layers import DecoderBlock, FeedForward, RotaryEmbedding
from keras_kvcache.layers.mixture_of_experts import Experts, MixtureOfExperts
from keras_kvcache.layers.normalization import make_normalization

B, T, S, E = 3, 7, 13, 5  # E encoder positions
D, ENCODER_D = 12, 19
CLOSE = dict(rtol=0, atol=1e-5)


def make_block(encoder=False, **options):
    defaults = dict(
        num_query_heads=6,
        intermediate_dim=17,
        num_key_value_heads=2,
        head_dim=14,
        rotary_embedding=RotaryEmbedding(max_wavelength=50.0),
        kernel_initializer="zeros",
        use_bias=True,
    )
    block = DecoderBlock(**{**defaults, **options})
    block.build((None, None, D), (None, None, ENCODER_D) if encoder else None)
    for seed, weight in enumerate(block.trainable_weights):
        weight.assign(0.2 * cases.noise(*weight.shape, seed=seed))
    return block


def caches(block, layout, slots=S):
    return cases.make_cache(block.attention, B, slots, layout)


def formula(block, x, encoded=None, encoder_mask=None):
    """The block in NumPy: each part on normed input, added to its input."""

    def norm(layer, x):
        gain, *bias = [cases.numpy(weight) for weight in layer.weights]
        if bias:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + block.layer_norm_epsilon)
        return x * gain + (bias[0] if bias else 0)

    def dense(layer, x):
        kernel, *bias = [cases.numpy(weight) for weight in layer.weights]
        return x @ kernel + (bias[0] if bias else 0)

    normed = norm(block.attention_norm, x)
    rotary = dict(base=50.0) if block.rotary_embedding else None
    attended, _ = reference.multi_head_attention(
        block.attention,
        normed,
        normed,
        causal=True,
        rotary=rotary,
        window=block.sliding_window,
        soft_cap=block.logit_soft_cap,
    )
    x = x + attended
    if encoded is not None:
        normed = norm(block.cross_attention_norm, x)
        heads = block.num_query_heads
        mask = np.ones((B, E), bool) if encoder_mask is None else encoder_mask
        mask = np.broadcast_to(mask[:, None, None], (B, heads, x.shape[1], E))
        attended, _ = reference.multi_head_attention(
            block.cross_attention,
            normed,
            encoded,
            mask=mask,
            soft_cap=block.logit_soft_cap,
        )
        x = x + attended
    normed = norm(block.feedforward_norm, x)
    inner = dense(block.feedforward.intermediate, normed)
    if block.gated_feedforward:
        gate = dense(block.feedforward.gate, normed)
        inner = gate / (1 + np.exp(-gate)) * inner
    else:
        inner = np.maximum(inner, 0)
    return x + dense(block.feedforward.output_dense, inner)


KINDS = {
    "llama": dict(use_bias=False),
    "gpt2": dict(
        normalization="layer_norm",
        layer_norm_epsilon=0.01,
        gated_feedforward=False,
        activation="relu",
        rotary_embedding=None,
        num_key_value_heads=None,
    ),
    "window": dict(sliding_window=3, logit_soft_cap=2.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_formula_and_cache(kind):
    block = make_block(**KINDS[kind])
    x = cases.noise(B, T, D)
    expected = formula(block, x)
    plain = cases.compiled(lambda x: block(x))(x)
    np.testing.assert_allclose(cases.numpy(plain), expected, **CLOSE)

    @cases.compiled
    def step(x, cache, index):
        return block(
            x, self_attention_cache=cache, self_attention_cache_update_index=index
        )

    for layout in cases.LAYOUTS if kind == "window" else ["head_major"]:
        cache, first = caches(block, layout), 0
        for size in (3, 1, 3):
            tokens = x[:, first : first + size]
            output, cache = step(tokens, cache, cases.int32([first] * B))
            np.testing.assert_allclose(
                cases.numpy(output), expected[:, first : first + size], **CLOSE
            )
            first += size


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_encoder_is_read_once(layout, masked):
    block = make_block(encoder=True, logit_soft_cap=3.0)
    x, encoded = cases.noise(B, T, D), cases.noise(B, E, ENCODER_D, seed=1)
    mask = np.arange(E) < np.array([[5], [2], [3]]) if masked else None
    expected = formula(block, x, encoded, mask)
    plain = cases.compiled(
        lambda x, encoded: block(x, encoded, encoder_padding_mask=mask)
    )(x, encoded)
    np.testing.assert_allclose(cases.numpy(plain), expected, **CLOSE)

    @cases.compiled
    def first_step(x, encoded, own, cross):
        return block(
            x,
            encoded,
            encoder_padding_mask=mask,
            self_attention_cache=own,
            self_attention_cache_update_index=0,
            cross_attention_cache=cross,
            cross_attention_cache_update_index=0,
        )

    @cases.compiled
    def later_step(x, own, cross, index):
        return block(
            x,
            encoder_padding_mask=mask,
            self_attention_cache=own,
            self_attention_cache_update_index=index,
            cross_attention_cache=cross,
        )

    own = caches(block, layout)
    cross = cases.make_cache(block.cross_attention, B, E, layout)
    output, own, cross = first_step(x[:, :3], encoded, own, cross)
    np.testing.assert_allclose(cases.numpy(output), expected[:, :3], **CLOSE)
    filled = cases.entries(cross)
    for index in range(3, T):
        token = x[:, index : index + 1]
        output, own, cross = later_step(token, own, cross, cases.int32(index))
        np.testing.assert_allclose(
            cases.numpy(output), expected[:, index : index + 1], **CLOSE
        )
    np.testing.assert_array_equal(cases.entries(cross), filled)


def test_only_the_encoder_is_cached():
    block = make_block(encoder=True)
    x, encoded = cases.noise(B, T, D), cases.noise(B, E, ENCODER_D, seed=1)
    cross = cases.make_cache(block.cross_attention, B, E, "dense")
    call = dict(cross_attention_cache_update_index=0)
    step = cases.compiled(
        lambda x, encoded, cross: block(x, encoded, cross_attention_cache=cross, **call)
    )
    returned = step(x, encoded, cross)
    assert len(returned) == 2
    np.testing.assert_allclose(
        cases.numpy(returned[0]), formula(block, x, encoded), **CLOSE
    )


def test_functional_model(tmp_path):
    block = DecoderBlock(
        6, 17, num_key_value_heads=2, head_dim=14, rotary_embedding=RotaryEmbedding()
    )
    x, encoded = keras.Input((T, D)), keras.Input((E, ENCODER_D))
    own = keras.Input((2, S, 2, 14))
    cross = keras.Input((2, E, 2, 14))
    index = keras.Input((), dtype="int32")
    start = keras.Input((), dtype="int32")
    returned = block(
        x,
        encoded,
        self_attention_cache=own,
        self_attention_cache_update_index=index,
        cross_attention_cache=cross,
        cross_attention_cache_update_index=start,
    )
    assert [r.shape for r in returned] == [(None, T, D), own.shape, cross.shape]
    model = keras.Model([x, encoded, own, cross, index, start], returned)
    feeds = [
        keras.ops.convert_to_tensor(array)
        for array in (
            cases.noise(B, T, D),
            cases.noise(B, E, ENCODER_D, seed=1),
            cases.noise(B, 2, S, 2, 14, seed=2),
            cases.noise(B, 2, E, 2, 14, seed=3),
            np.array([0, 3, 6], "int32"),
            np.zeros(B, "int32"),
        )
    ]
    model.save(tmp_path / "block.keras")
    loaded = keras.models.load_model(tmp_path / "block.keras")
    outputs = [cases.compiled(lambda x, m=m: m(x))(feeds) for m in (loaded, model)]
    for got, value in zip(*outputs, strict=True):
        np.testing.assert_allclose(cases.numpy(got), cases.numpy(value), **CLOSE)


def test_config_round_trip():
    block = make_block(
        normalization="layer_norm",
        layer_norm_epsilon=0.03,
        activation="gelu_tanh",
        gated_feedforward=False,
        attention_bias=False,
        sliding_window=5,
        query_scale=0.7,
        logit_soft_cap=11.0,
        query_key_norm=True,
        query_key_norm_epsilon=0.02,
        use_post_attention_norm=True,
        use_post_ffw_norm=True,
        dropout=0.125,
        kernel_initializer="ones",
        name="block",
        dtype="mixed_bfloat16",
    )
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(block)
    )
    assert copy.get_config() == block.get_config()
    copy.set_weights(block.get_weights())
    x = cases.noise(B, T, D)
    outputs = [cases.compiled(lambda x, b=b: b(x))(x) for b in (block, copy)]
    assert keras.backend.standardize_dtype(outputs[1].dtype) == "bfloat16"
    np.testing.assert_array_equal(*map(cases.numpy, outputs))


def test_dropout():
    """Dropped whole, each part adds nothing, and the input comes through."""
    block = make_block(dropout=0.99999)
    x = cases.noise(B, T, D)
    np.testing.assert_allclose(
        cases.numpy(block(x, training=True)), x, rtol=0, atol=1e-5
    )
    assert abs(cases.numpy(block(x, training=False)) - x).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_mask_of_the_input(dtype, recwarn):
    """It goes on to the output; real tokens are as if padding weren't there."""
    block = make_block(dtype=dtype)
    embedding = keras.layers.Embedding(29, D, mask_zero=True, dtype=dtype)
    ids = np.array([[3, 5, 7, 0, 0], [0, 0, 2, 9, 4], [1, 2, 3, 4, 5]])
    x = embedding(ids)
    output = block(x)
    np.testing.assert_array_equal(cases.numpy(output._keras_mask), ids != 0)
    warnings = [str(w.message) for w in recwarn]
    assert not [w for w in warnings if "does not support masking" in w]
    # Rotation leaves it equal wherever it starts.
    alone = cases.compiled(lambda x: block(x))(x[1:2, 2:])
    np.testing.assert_allclose(
        cases.numpy(output)[1, 2:],
        cases.numpy(alone)[0],
        rtol=0,
        atol=1e-5 if dtype == "float32" else 0.05,
    )


def test_mask_of_the_encoder_holds_when_its_cache_is_read():
    block = make_block(encoder=True)
    ids = np.array([[3, 5, 7, 0, 0], [1, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    encoder = keras.layers.Embedding(29, ENCODER_D, mask_zero=True)(ids)
    x = cases.noise(3, 4, D)
    whole = block(x, encoder)
    held = [keras.ops.zeros((3, 2, 5, 2, 14))] * 2
    steps = []
    for index in range(4):
        output, *held = block(
            x[:, index : index + 1],
            encoder,
            self_attention_cache=held[0],
            self_attention_cache_update_index=index,
            cross_attention_cache=held[1],
            cross_attention_cache_update_index=0 if index == 0 else None,
        )
        steps.append(cases.numpy(output))
    np.testing.assert_allclose(np.concatenate(steps, 1), cases.numpy(whole), atol=1e-5)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(
    "encoder, changed, words",
    [
        (False, dict(encoder_sequence=(B, E, ENCODER_D)), ["without", "encoder_seq"]),
        (False, dict(cross_attention_cache=(B, 2, E, 2, 14)), ["without", "cross_"]),
        (False, dict(encoder_padding_mask=(B, E)), ["without", "encoder_padding_mask"]),
        (True, dict(), ["needs", "`encoder_sequence`", "neither"]),
        (True, dict(encoder_padding_mask=(B, E)), ["needs", "encoder_padding_mask"]),
        (False, dict(self_attention_cache_update_index=3), ["needs a `cache`"]),
        (
            False,
            dict(
                self_attention_cache=(B, 2, S, 2, 14),
                self_attention_cache_update_index=7,
            ),
            ["index=7", "T=7", "S=13"],
        ),
        (
            False,
            dict(
                self_attention_cache=(B, 2, S, 6, 14),
                self_attention_cache_update_index=0,
            ),
            ["heads K = 2", "6"],
        ),
    ],
    ids=str,
)
def test_bad_calls(encoder, changed, words, symbolic):
    block = make_block(encoder=encoder)
    make = keras.KerasTensor if symbolic else keras.ops.zeros
    changed = {
        name: make(value) if isinstance(value, tuple) else value
        for name, value in changed.items()
    }
    with pytest.raises(ValueError) as caught:
        block(make((B, T, D)), **changed)
    for word in words:
        assert word in str(caught.value)


def test_bad_builds():
    with pytest.raises(ValueError, match="D=12, num_query_heads=5"):
        DecoderBlock(5, 17).build((None, None, D))
    with pytest.raises(ValueError, match="`normalization`.*'batch_norm'"):
        DecoderBlock(6, 17, normalization="batch_norm").build((None, None, D))


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(gated):
    layer = FeedForward(17, activation="gelu_tanh", gated=gated, use_bias=True)
    x = cases.noise(B, T, D)
    layer(x)

    def dense(name, x):
        kernel, bias = (cases.numpy(weight) for weight in getattr(layer, name).weights)
        return x @ kernel + bias

    def gelu_tanh(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    inner = dense("intermediate", x)
    inner = gelu_tanh(dense("gate", x)) * inner if gated else gelu_tanh(inner)
    np.testing.assert_allclose(
        cases.numpy(layer(x)), dense("output_dense", inner), **CLOSE
    )
    copy = FeedForward.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()


def test_mixture_of_experts():
    """Each token's best two of five, weighted by how fit they are."""
    layer = MixtureOfExperts(5, 17)
    x = cases.noise(B, T, D)
    layer(x)
    for seed, weight in enumerate(layer.weights):
        weight.assign(cases.noise(*weight.shape, seed=seed))
    router, gates, inners, outputs = (cases.numpy(weight) for weight in layer.weights)
    expected = np.zeros_like(x)
    for row, token in np.ndindex(B, T):
        inputs = x[row, token]
        scores = inputs @ router
        best = np.argsort(scores)[-2:]
        weights = np.exp(scores[best]) / np.exp(scores[best]).sum()
        for weight, e in zip(weights, best, strict=True):
            gate = inputs @ gates[e]
            inner = gate / (1 + np.exp(-gate)) * (inputs @ inners[e])
            expected[row, token] += weight * (inner @ outputs[e])
    atol = 1e-4 * abs(expected).max()
    np.testing.assert_allclose(cases.numpy(layer(x)), expected, rtol=1e-4, atol=atol)
    # A token alone is run by its experts only.
    for row, token in np.ndindex(B, T):
        alone = cases.numpy(layer(x[row, token][None, None]))
        np.testing.assert_allclose(
            alone[0, 0], expected[row, token], rtol=1e-4, atol=atol
        )
    copy = MixtureOfExperts.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()


def test_few_tokens_read_only_their_experts():
    """What isn't read may hold anything."""
    experts = Experts(11, 5)
    experts.build((None, 7))
    for weight in experts.weights:
        values = np.full(weight.shape, np.nan)
        values[[3, 8]] = 0.1
        weight.assign(values)
    for tokens in (1, 2):
        chosen, weights = [[8, 3]] * tokens, np.ones((tokens, 2), "float32")
        answer = experts(np.ones((tokens, 7), "float32"), np.array(chosen), weights)
        assert np.isfinite(cases.numpy(answer)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unit_offset_rms_norm(dtype):
    layer = make_normalization("unit_offset_rms_norm", 0.01, "norm", dtype)
    x = cases.noise(B, T, D)
    layer.build(x.shape)
    layer.scale.assign(cases.noise(D, seed=1))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.01)
    expected = expected * (1 + cases.noise(D, seed=1))
    assert keras.backend.standardize_dtype(layer(x).dtype) == dtype
    atol = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(cases.numpy(layer(x)), expected, rtol=0, atol=atol)


def test_adopted_parts_are_shared():
    ours, theirs = make_block(), make_block(name="theirs")
    block = DecoderBlock(6, 17, num_key_value_heads=2, head_dim=14, use_bias=True)
    block.adopt(
        attention=dict(query_dense=theirs.attention.query_dense),
        feedforward=theirs.feedforward,
    )
    block.build((None, None, D))
    assert block.attention.query_dense is theirs.attention.query_dense
    assert block.feedforward is theirs.feedforward
    assert block.attention.key_dense is not theirs.attention.key_dense
    with pytest.raises(ValueError, match="`adopt` must come before.*feedforward"):
        ours.adopt(feedforward=theirs.feedforward)
