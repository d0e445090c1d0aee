"""Biases and sinks of scores, by every way to attend."""

import warnings

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
import reference
from kernel_cases import attend_by_kernel

from keras_kvcache import DecoderLM
from keras_kvcache.attention import (
    Scoring,
    attend,
    attend_with_scores,
    token_positions,
    view_masks,
)
from keras_kvcache.attention.kernels.decode_attention import NAME
from keras_kvcache.attention.kernels.triton_attention import attend_by_triton
from keras_kvcache.attention.scoring import Alibi
from keras_kvcache.caches import CacheSpec, Rolling
from keras_kvcache.caches.trees import as_floats
from keras_kvcache.layers import CachedMultiHeadAttention
from keras_kvcache.runtime import native

B, N, K, H = 2, 6, 2, 13
S, FILLS = 83, (64, 61)  # whole groups of int4, or a part of one
DISTANCES = 29
CODECS = ("float32", "bfloat16", "float16", "int8", "int4")
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.normal(size=(N, DISTANCES)).astype("float32")
SINK = RANDOM.normal(1.0, size=N).astype("float32")


def sloped(query, slot):
    """ALiBi's slopes, and a step at distance 5, as a function of positions."""
    slopes = keras.ops.reshape(2.0 ** -keras.ops.arange(1.0, N + 1), (N, 1, 1))
    distance = keras.ops.cast(query - slot, "float32")
    return keras.ops.where(distance > 5, 0.5, 0.0) - slopes * distance


def sloped_in_numpy(head, query, slot):
    return 0.5 * (query - slot > 5) - 2.0 ** -(head + 1) * (query - slot)


BIASES = {
    "table": (TABLE, TABLE),
    "one_entry": (TABLE[:, :1], TABLE[:, :1]),
    "function": (sloped, sloped_in_numpy),
    "none": (None, None),
}


def tensor(x):
    return x if x is None or callable(x) else keras.ops.convert_to_tensor(x)


def make_filled(codec, layout, kind="static", value_dim=H, rows=B):
    """A cache that holds `FILLS` entries, and what its codec made of them."""
    cache = CacheSpec(
        rows, S, K, H, value_dim, codec=codec, layout=layout, kind=kind
    ).allocate()
    entries = (
        cases.noise(rows, max(FILLS), K, size, seed=seed)
        for seed, size in ((1, H), (2, value_dim))
    )
    cache, _ = cache.update(*map(keras.ops.convert_to_tensor, entries), 0)
    return cache


def entries_of(cache):
    """Keys and values as the codec has them; float64."""
    return tuple(np.float64(cases.numpy(x)) for x in cache.storage.decode())


def expect(query, cache, positions, soft_cap, bias, sink):
    """By NumPy; each row sees what stands at or before its query."""
    keys, values = entries_of(cache)
    rows = [
        reference.attend(
            np.float64(query[row]),
            keys[row],
            values[row],
            0.3,
            causal=True,
            soft_cap=soft_cap,
            positions=positions[row],
            bias=bias,
            sink=sink,
        )
        for row in range(len(query))
    ]
    return [np.stack(arrays) for arrays in zip(*rows, strict=True)]


def make_call(cache, length, bias, sink, soft_cap=None):
    """Arguments of `attend`, and the positions of the queries `(B, T)`."""
    query = cases.noise(B, length, N, H, seed=3)
    index = np.array(FILLS) - length
    positions = token_positions(cases.int32(index), length)
    view = cache.view(cases.int32(FILLS))
    masks = view_masks(view, positions, causal=True)
    scoring = Scoring(0.3, soft_cap, tensor(bias), tensor(sink))
    arguments = (keras.ops.convert_to_tensor(query), view, masks, scoring, positions)
    return arguments, index[:, None] + np.arange(length)


def check(got, expected):
    np.testing.assert_allclose(cases.numpy(got), expected, rtol=0, atol=1e-5)


@pytest.fixture(params=["kernel", "plain"])
def way(request):
    """With the kernel for CPUs where it suits, and without."""
    if request.param == "plain" and keras.backend.backend() == "jax":
        request.getfixturevalue("without_compiler")
    return request.param


@pytest.mark.parametrize(
    "name, length", [("table", 1), ("table", 5), ("table", 31), ("function", 5)]
)
@pytest.mark.parametrize("codec, layout", cases.stored(CODECS))
def test_every_layout_and_codec(name, codec, layout, length, way):
    cache = make_filled(codec, layout)
    bias, in_numpy = BIASES[name]
    arguments, positions = make_call(cache, length, bias, SINK, soft_cap=1.5)
    expected, weights = expect(
        cases.numpy(arguments[0]), cache, positions, 1.5, in_numpy, SINK
    )
    check(cases.compiled(lambda: attend(*arguments))(), expected)
    if length == 5:
        output, beside = attend_with_scores(*arguments)
        check(output, expected)
        check(beside[..., : max(FILLS)], weights[..., : max(FILLS)])


@pytest.mark.parametrize("sink", [SINK, None], ids=["sink", "no_sink"])
@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("value_dim", [H, 7])
def test_each_alone(value_dim, name, sink, way):
    cache = make_filled("float32", "head_major", value_dim=value_dim)
    bias, in_numpy = BIASES[name]
    arguments, positions = make_call(cache, 3, bias, sink)
    query = cases.numpy(arguments[0])
    expected, _ = expect(query, cache, positions, None, in_numpy, sink)
    check(cases.compiled(lambda: attend(*arguments))(), expected)
    # The same for all slots changes nothing by itself.
    if name in ("table", "function") or sink is not None:
        without, _ = expect(query, cache, positions, None, None, None)
        assert abs(expected - without).max() > 0.01


@pytest.mark.jax_only
@pytest.mark.parametrize(
    "name, sink, length",
    [
        ("table", SINK, 1),
        ("table", SINK, 31),
        ("table", None, 31),
        ("one_entry", None, 31),
        ("none", SINK, 31),
    ],
    ids=["table-sink-1", "table-sink", "table", "one_entry", "sink"],
)
@pytest.mark.parametrize(
    "codec, layout", cases.stored(["float32", "bfloat16", "float16", "int8"])
)
def test_by_the_kernel_for_gpus(codec, layout, length, name, sink):
    cache = as_floats(make_filled(codec, layout))  # as caches are on a GPU
    bias, in_numpy = BIASES[name]
    arguments, positions = make_call(cache, length, bias, sink, soft_cap=1.5)
    query = cases.numpy(arguments[0])
    expected, _ = expect(query, cache, positions, 1.5, in_numpy, sink)
    masks = [np.ones((1, 1, 1, 1), bool) if m is None else m for m in arguments[2]]
    check(attend_by_kernel(query, arguments[1], masks, *arguments[3:]), expected)


@pytest.mark.jax_only
@pytest.mark.parametrize("layout, length", [("head_major", 31), ("dense", 1)])
def test_triton_gets_the_kernel(layout, length):
    """All operations of a bias are such that Pallas lowers.

    JAX 0.10 does on any machine; later ones look for a GPU.
    """
    arguments, _ = make_call(make_filled("bfloat16", layout), length, TABLE, SINK)
    query, view, masks, scoring, positions = arguments
    leaves, tree = jax.tree_util.tree_flatten((view.segments, masks, scoring))

    def attend_grouped(query, positions, *leaves):
        segments, masks, scoring = tree.unflatten(leaves)
        arguments = (segments, masks, length, scoring, positions)
        return attend_by_triton(query, *arguments)

    grouped = np.zeros((B, K, N // K * length, H), "float32")
    traced = jax.jit(attend_grouped).trace(grouped, positions, *leaves)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        try:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        except RuntimeError as error:
            assert "No supported GPU devices" in str(error)
            pytest.skip("this JAX lowers for GPUs that are there only")
    assert "decode_attention" in text and "merge_parts" in text


@pytest.mark.parametrize("kind", [Rolling(29), Rolling(29, sinks=3)])
def test_slots_of_a_ring_stand_where_they_stand(kind, way):
    """One token at a time and in chunks, past what the ring holds."""
    cache = CacheSpec(B, S, K, H, kind=kind).allocate()
    keys, values = (cases.noise(B, 89, K, H, seed=seed) for seed in (1, 2))
    queries = cases.noise(B, 89, N, H, seed=3)
    scoring = Scoring(0.3, None, tensor(TABLE), tensor(SINK))
    mask = np.arange(89) > np.arange(89)[:, None] - kind.window
    mask |= np.arange(89) < kind.sinks
    mask &= np.arange(89) <= np.arange(89)[:, None]

    @cases.compiled
    def step(cache, query, key, value, index):
        cache, view = cache.update(key, value, index)
        positions = token_positions(index, query.shape[1])
        masks = view_masks(view, positions, causal=True)
        return attend(query, view, masks, scoring, positions), cache

    outputs, first = [], 0
    for length in (31, 31, 1, 1, 23, 1, 1):
        part = slice(first, first + length)
        arguments = (x[:, part] for x in (queries, keys, values))
        arguments = map(keras.ops.convert_to_tensor, arguments)
        output, cache = step(cache, *arguments, cases.int32(first))
        outputs.append(cases.numpy(output))
        first += length
    for row in range(B):
        expected, _ = reference.attend(
            *(np.float64(x[row]) for x in (queries, keys, values)),
            0.3,
            mask=np.broadcast_to(mask, (N, 89, 89)),
            bias=TABLE,
            sink=SINK,
        )
        got = np.concatenate([output[row] for output in outputs])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sink", [-np.inf, -1e4, 1e4])
def test_sinks_of_any_size(sink, way):
    """One that no weight is left for, and one that takes all."""
    cache = make_filled("float32", "head_major")
    sinks = np.full(N, sink, "float32")
    arguments, positions = make_call(cache, 1, None, sinks)
    query = cases.numpy(arguments[0])
    expected, _ = expect(query, cache, positions, None, None, None)
    expected = 0 * expected if sink == 1e4 else expected
    check(attend(*arguments), expected)
    hidden = tuple(keras.ops.zeros((1, 1, 1, 1), "bool") for _ in arguments[2])
    nothing = attend(*arguments[:2], hidden, *arguments[3:])
    np.testing.assert_array_equal(cases.numpy(nothing), 0 * expected)


@pytest.mark.jax_only
@pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")
def test_which_programs_call_the_kernel():
    """A table and a sink are operands of it, and no others are there without them."""
    cache = make_filled("float32", "head_major")
    counts = []
    for bias, sink in ((None, None), (None, SINK), (TABLE, None), (TABLE, SINK)):
        (query, *arguments), _ = make_call(cache, 1, bias, sink)
        lowered = jax.jit(lambda query, rest=arguments: attend(query, *rest))
        lines = lowered.lower(query).as_text().splitlines()
        (call,) = (line for line in lines if f"@{NAME}(" in line)
        counts.append(call.partition("(")[2].partition(")")[0].count("%"))
    # The query; keys, values and a mask; a sink; a table and two rows of positions.
    assert counts == [4, 5, 7, 8]
    (query, *arguments), _ = make_call(cache, 1, sloped, SINK)
    lowered = jax.jit(lambda query: attend(query, *arguments)).lower(query)
    assert NAME not in lowered.as_text()


@pytest.mark.parametrize("name", ["bias", "sink", "positions"])
def test_what_does_not_fit_is_refused(name):
    cache = make_filled("float32", "head_major")
    bias, sink = TABLE[: 5 if name == "bias" else N], SINK[: 5 if name == "sink" else N]
    (*arguments, positions), _ = make_call(cache, 1, bias, sink)
    positions = None if name == "positions" else positions
    for function in (attend, attend_with_scores):
        with pytest.raises(ValueError, match=f"`{name}`.* must .*Received"):
            function(*arguments, positions)


# The layer.


@keras.saving.register_keras_serializable(package="tests")
class SlopedLayer(keras.layers.Layer):
    """A bias with a weight of its own."""

    def build(self, *shapes):
        self.slopes = self.add_weight(shape=(4,), initializer="ones")

    def call(self, query, slot):
        distance = keras.ops.cast(query - slot, "float32")
        return -keras.ops.reshape(self.slopes, (4, 1, 1)) * distance


@keras.saving.register_keras_serializable(package="tests")
def halved(query, slot):
    return -keras.ops.cast(query - slot, "float32") / 2


LAYER_BIASES = {
    "weight": (lambda: 3, None),
    "function": (lambda: halved, lambda n, query, slot: (slot - query) / 2),
    "layer": (SlopedLayer, lambda n, query, slot: (n + 1) * (slot - query) / 4),
}


def make_layer(name):
    bias, in_numpy = LAYER_BIASES[name][0](), LAYER_BIASES[name][1]
    layer = cases.make_layer(
        4, 6, num_key_value_heads=2, score_bias=bias, use_sink_logits=True
    )
    layer.sink_logits.assign(SINK[:4])
    if name == "weight":
        layer.score_bias_table.assign(TABLE[:4, :3])
        in_numpy = TABLE[:4, :3]
    if name == "layer":
        bias.slopes.assign(np.arange(1, 5) / 4)
    return layer, in_numpy


@pytest.mark.parametrize("layout", [None, *cases.LAYOUTS])
@pytest.mark.parametrize("name", LAYER_BIASES)
def test_the_layer(name, layout):
    """As a whole, and through a cache in chunks."""
    layer, in_numpy = make_layer(name)
    x = cases.noise(B, 11, cases.D)
    rules = dict(causal=True, bias=in_numpy, sink=SINK[:4])
    expected, weights = reference.multi_head_attention(layer, x, x, **rules)
    if layout is None:
        output, scores = layer(x, x, use_causal_mask=True, return_attention_scores=True)
        check(output, expected)
        check(scores, weights)
        check(layer(x, x, use_causal_mask=True), expected)
        return
    cache = cases.make_cache(layer, B, 17, layout, filler=0.0)

    @cases.compiled
    def step(x, cache, index):
        return layer(x, x, cache=cache, cache_update_index=index, use_causal_mask=True)

    first = 0
    for length in (5, 1, 4, 1):
        part = slice(first, first + length)
        output, cache = step(x[:, part], cache, cases.int32(first))
        check(output, expected[:, part])
        first += length


@pytest.mark.parametrize("name", LAYER_BIASES)
def test_the_layer_in_a_saved_model(name, tmp_path):
    layer, _ = make_layer(name)
    again = CachedMultiHeadAttention.from_config(layer.get_config())
    assert again.use_sink_logits and type(again.score_bias) is type(layer.score_bias)
    inputs = keras.Input((7, cases.D))
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    model.save(tmp_path / "model.keras")
    x = cases.noise(B, 7, cases.D)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    check(loaded(x), cases.numpy(model(x)))


@pytest.mark.jax_only
def test_the_layer_learns_them():
    layer, _ = make_layer("weight")
    x = cases.noise(B, 7, cases.D)
    names = [weight.name for weight in layer.trainable_variables]
    assert names[:2] == ["score_bias_table", "sink_logits"]

    def loss(weights):
        output, _ = layer.stateless_call(weights, [], x, x, use_causal_mask=True)
        return (output**2).sum()

    weights = [variable.value for variable in layer.trainable_variables]
    table, sink, *_ = jax.grad(loss)(weights)
    assert (abs(table) > 1e-4).all() and (abs(sink) > 1e-4).all()


def test_weights_of_scores_stay_as_precise_as_they_are_stored():
    layer = cases.make_layer(4, 6, dtype="mixed_bfloat16", use_sink_logits=True)
    layer.sink_logits.assign(SINK[:4])
    x = cases.noise(B, 5, cases.D)
    with keras.src.backend.AutocastScope("bfloat16"):
        held = keras.ops.convert_to_tensor(layer.sink_logits)
    assert keras.backend.standardize_dtype(held.dtype) == "float32"
    assert np.isfinite(cases.numpy(layer(x, x))).all()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(score_bias=0), ["`score_bias`", "0"]),
        (dict(score_bias=1.5), ["`score_bias`", "1.5"]),
        (dict(score_bias="slopes"), ["`score_bias`", "'slopes'"]),
        (dict(use_sink_logits=3), ["`use_sink_logits`", "3"]),
        (dict(score_bias=3, flash_attention=True), ["`score_bias`", "flash"]),
        (dict(use_sink_logits=True, flash_attention=True), ["`use_sink_logits`"]),
    ],
    ids=str,
)
def test_arguments_that_make_no_scores(options, words):
    with pytest.raises(ValueError) as caught:
        CachedMultiHeadAttention(4, 6, **options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("option", [dict(score_bias=3), dict(use_sink_logits=True)])
def test_they_need_one_axis(option):
    layer = CachedMultiHeadAttention(4, 6, attention_axes=(1, 2), **option)
    x = cases.noise(B, 3, 5, cases.D)
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` needs"):
        layer(x, x)


WIDTH, INNER = 42, 59


def fed(x, weights):
    """A gated feed-forward part, with SiLU."""
    gate = x @ weights["feedforward/gate/kernel"]
    inner = x @ weights["feedforward/intermediate/kernel"]
    return (gate / (1 + np.exp(-gate)) * inner) @ weights["feedforward/output/kernel"]


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def logits_in_numpy(lm, ids, slopes, sinks):
    """A decoder of one row in float64, with ALiBi and sinks; no rotation, no table."""
    weights = {
        weight.path.split("/", 1)[1]: np.float64(cases.numpy(weight.value))
        for weight in lm.weights
    }
    table = weights["token_embedding/embeddings"]
    x, places = table[ids], np.arange(len(ids))
    distance = places[:, None] - places
    for block, sink in enumerate(sinks):
        own = {
            name.removeprefix(f"block_{block}/"): value
            for name, value in weights.items()
            if name.startswith(f"block_{block}/")
        }
        y = normed(x, own["attention_norm/scale"])
        q, k, v = (
            np.einsum("td,dnh->tnh", y, own[f"attention/{name}/kernel"])
            for name in ("query", "key", "value")
        )
        mixed = np.zeros_like(q)
        for head, slope in enumerate(slopes):
            group = head // (N // K)
            scores = q[:, head] @ k[:, group].T * q.shape[-1] ** -0.5
            scores = np.where(distance >= 0, scores - slope * distance, -np.inf)
            scores = np.exp(scores)
            total = scores.sum(-1, keepdims=True) + np.exp(sink[head])
            mixed[:, head] = scores / total @ v[:, group]
        x = x + np.einsum(
            "tnh,nhd->td", mixed, own["attention/attention_output/kernel"]
        )
        x = x + fed(normed(x, own["feedforward_norm/scale"]), own)
    return normed(x, weights["final_norm/scale"]) @ table.T


def bloom_slopes(heads=N):
    """ALiBi's slopes of each head, as transformers' Bloom has them."""
    build = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    torch = pytest.importorskip("torch")
    alibi = build.build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)
    return np.float64(alibi[:, 0, 1].numpy())


def test_the_slopes_are_those_of_bloom():
    """Of a power of two, and of numbers between two."""
    for heads in (1, 2, 7, 8, 13, 32):
        slopes = bloom_slopes(heads)
        np.testing.assert_allclose(Alibi(heads).slopes, slopes, rtol=1e-6)


@pytest.mark.parametrize("bias", ["table", "function", "alibi"])
def test_a_decoder_with_alibi_and_sinks(bias):
    """By the options of a family, and the weights of the bias and of the sinks."""
    slopes, length = bloom_slopes(), 19

    def alibi(query, slot):
        distance = keras.ops.cast(query - slot, "float32")
        return -keras.ops.reshape(slopes.astype("float32"), (N, 1, 1)) * distance

    lm = DecoderLM(
        vocabulary_size=101,
        num_layers=2,
        num_query_heads=N,
        num_key_value_heads=K,
        hidden_dim=WIDTH,
        intermediate_dim=INNER,
        max_sequence_length=97,
        position_embedding="none",
        score_bias={"table": 97, "function": alibi}.get(bias, bias),
        layer_options=[{}, {"use_sink_logits": True}],
    )
    noise = np.random.default_rng(3)
    for weight in lm.weights:
        value = noise.normal(0, 0.3, weight.shape)
        weight.assign(value + 1 if weight.name == "scale" else value)
    for block in lm.blocks if bias == "table" else ():
        table = block.attention.score_bias_table
        table.assign(-slopes[:, None] * np.arange(97))
        table.trainable = False
    sink = np.float64(cases.numpy(lm.blocks[1].attention.sink_logits.value))
    sinks = [np.full(N, -np.inf), sink]
    ids = noise.integers(0, 101, length)
    expected = logits_in_numpy(lm, ids, slopes, sinks)
    # Both count: without them the answer is another one.
    for other in ((slopes * 0, sinks), (slopes, sinks[:1] * 2)):
        assert np.abs(logits_in_numpy(lm, ids, *other) - expected).max() > 0.1
    ours = cases.numpy(lm(ids[None]))[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    cache, pieces = lm.init_cache(1, 97), []
    for first, end in ((0, 11), *((i, i + 1) for i in range(11, length))):
        piece, _, cache = lm.call_with_cache(ids[None, first:end], cache, first)
        pieces.append(cases.numpy(piece)[0])
    np.testing.assert_allclose(np.concatenate(pieces), expected, rtol=1e-5, atol=1e-5)
    written = ids.tolist()
    for _ in range(7):
        best = logits_in_numpy(lm, np.array(written), slopes, sinks)[-1].argmax()
        written.append(int(best))
    assert lm.generate(ids.tolist(), max_new_tokens=7) == written
    # Its positions have no last one.
    assert not lm.config.has_last_position
