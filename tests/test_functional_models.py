"""A decoder as a functional model: saved, compiled, exported, run without Keras.

It takes token ids, the caches and an index a row, and gives logits and the caches.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
import types

import attention_cases as cases
import keras
import numpy as np
import pytest
from conftest import skip_if_too_new
from keras import layers, ops

from keras_kvcache.layers import CachedMultiHeadAttention, RotaryEmbedding

V, L, N, K, H, D, S = 41, 2, 6, 2, 10, 46, 23
PROMPTS = np.array([[3, 14, 15, 9, 26], [5, 35, 0, 0, 0]], "int32")
LENGTHS = np.array([5, 2], "int32")
NEW = 11


def make_decoder():
    """The decoder with caches, and a plain one of the same layers."""
    keras.utils.set_random_seed(0)
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    caches = [keras.Input((2, S, K, H), name=f"cache_{i}") for i in range(L)]
    index = keras.Input((), dtype="int32", name="index")

    loud = functools.partial(layers.Dense, kernel_initializer="lecun_normal")
    plain = cached = layers.Embedding(V, D, embeddings_initializer="normal")(token_ids)
    updated = []
    for cache in caches:
        norm = layers.RMSNormalization()
        attention = CachedMultiHeadAttention(
            N,
            H,
            num_key_value_heads=K,
            rotary_embedding=RotaryEmbedding(),
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.4),
        )
        feed_forward = keras.Sequential(
            [layers.RMSNormalization(), loud(2 * D, activation="silu"), loud(D)]
        )
        x = norm(cached)
        attended, cache = attention(
            x, x, cache=cache, cache_update_index=index, use_causal_mask=True
        )
        cached = cached + attended
        cached = cached + feed_forward(cached)
        updated.append(cache)
        x = norm(plain)
        plain = plain + attention(x, x, use_causal_mask=True)
        plain = plain + feed_forward(plain)
    norm, project = layers.RMSNormalization(), loud(V)
    with_caches = keras.Model(
        [token_ids, *caches, index], [project(norm(cached)), *updated]
    )
    return with_caches, keras.Model(token_ids, project(norm(plain)))


def decode(step, prompts, lengths, count, cache_shape, num_caches):
    """Greedy decoding, one token at a time, each row at its own index.

    `step(token_ids, caches, index)` gives `logits, caches`, and NumPy is all that is
    needed besides: the scripts below contain this function.
    """
    caches = [np.zeros((len(prompts), *cache_shape), "float32")] * num_caches
    rows, tokens = np.arange(len(prompts)), []
    for place in range(lengths.max()):
        # A row at its end writes its last token again.
        index = np.minimum(place, lengths - 1)
        logits, caches = step(prompts[rows, index][:, None], caches, index)
    for index in range(count):
        token = np.asarray(logits)[:, -1].argmax(-1).astype("int32")
        tokens.append(token.tolist())
        logits, caches = step(token[:, None], caches, lengths + np.int32(index))
    return np.transpose(tokens).tolist()


ARGUMENTS = dict(count=NEW, cache_shape=(2, S, K, H), num_caches=L)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The model, its file, and what it's to say: by no cache, all at once."""
    model, plain = make_decoder()
    path = tmp_path_factory.mktemp("functional") / "decoder.keras"
    model.save(path)
    whole, expected = cases.compiled(plain), []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        text = prompt[:length].tolist()
        for _ in range(NEW):
            # Causal: what pads the text to one length has no say.
            padded = np.pad([text], [[0, 0], [0, S - len(text)]])
            logits = ops.convert_to_numpy(whole(padded.astype("int32")))
            text.append(int(logits[0, len(text) - 1].argmax()))
        expected.append(text[length:])
    assert len(set(expected[0])) > 3, "a varied answer shows more"
    return types.SimpleNamespace(model=model, path=path, expected=expected)


def called(model):
    def step(token_ids, caches, index):
        feeds = [ops.convert_to_tensor(x) for x in (token_ids, *caches, index)]
        logits, *caches = model(feeds)
        return ops.convert_to_numpy(logits), caches

    return step


def predicted(model):
    def step(token_ids, caches, index):
        feeds = [token_ids, *map(ops.convert_to_numpy, caches), index]
        logits, *caches = model.predict(feeds, verbose=0)
        return logits, caches

    return step


def jitted(model):
    """One program that takes the weights and updates the caches in place."""
    jax = pytest.importorskip("jax")
    weights = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]

    @functools.partial(jax.jit, donate_argnames="caches")
    def run(weights, token_ids, caches, index):
        outputs, _ = model.stateless_call(*weights, [token_ids, *caches, index])
        return outputs[0], outputs[1:]

    def step(token_ids, caches, index):
        given = [jax.numpy.array(cache) for cache in caches]
        logits, caches = run(weights, token_ids, given, index)
        assert all(cache.is_deleted() for cache in given)
        return logits, caches

    return step


@pytest.mark.parametrize(
    "runner", [called, predicted, pytest.param(jitted, marks=pytest.mark.jax_only)]
)
def test_loaded_model_decodes(case, runner):
    """Token by token, what the plain model says of the whole text."""
    loaded = keras.models.load_model(case.path)
    assert decode(runner(loaded), PROMPTS, LENGTHS, **ARGUMENTS) == case.expected


def test_loaded_model_gives_equal_outputs(case):
    rng = np.random.default_rng(0)
    feeds = [PROMPTS, *rng.normal(size=(L, 2, 2, S, K, H)).astype("float32"), LENGTHS]
    loaded = keras.models.load_model(case.path)
    for got, expected in zip(loaded(feeds), case.model(feeds), strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(got), ops.convert_to_numpy(expected), atol=1e-5
        )


def test_padded_prompts_in_one_call(case):
    """What padding writes is past a row's end, and overwritten before it's seen."""
    step = called(case.model)
    empty = [np.zeros((2, 2, S, K, H), "float32")] * L
    logits, caches = step(PROMPTS, empty, np.zeros(2, "int32"))
    logits = logits[np.arange(2), LENGTHS - 1]
    answer = []
    for place in range(NEW):
        token = logits.argmax(-1).astype("int32")
        answer.append(token)
        logits, caches = step(token[:, None], caches, LENGTHS + np.int32(place))
        logits = logits[:, -1]
    assert np.transpose(answer).tolist() == case.expected


EXPORT = """
import sys
import keras
import keras_kvcache
source, path, kind, fixed = sys.argv[1:]
model = keras.models.load_model(source)
rows, length = (2, 1) if fixed == "fixed" else (None, None)
signature = [
    keras.InputSpec(
        shape=(rows, *[length if name == "token_ids" else size for size in shape]),
        dtype=dtype,
        name=name,
    )
    for (_, *shape), dtype, name in [(x.shape, x.dtype, x.name) for x in model.inputs]
]
if kind == "onnx":  # It insists on a model that was called.
    model([keras.ops.zeros([n or 1 for n in x.shape], x.dtype) for x in model.inputs])
model.export(path, format=kind, input_signature=[signature], verbose=False)
"""

# Each defines `step` from `path`.
RUNTIMES = {
    "tf_saved_model": """
import tensorflow as tf
loaded = tf.saved_model.load(path)
def step(token_ids, caches, index):
    logits, *caches = loaded.serve([*map(tf.constant, (token_ids, *caches, index))])
    return logits, caches
""",
    "litert": """
import tensorflow as tf
run = tf.lite.Interpreter(path).get_signature_runner()
def step(token_ids, caches, index):
    caches = {f"cache_{i}": cache for i, cache in enumerate(caches)}
    outputs = run(token_ids=token_ids, index=index, **caches)
    return outputs["output_0"], [outputs["output_1"], outputs["output_2"]]
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
names = [put.name for put in session.get_inputs()]
def step(token_ids, caches, index):
    feeds = zip(names, (token_ids, *caches, index), strict=True)
    logits, *caches = session.run(None, dict(feeds))
    return logits, caches
""",
}


def run_script(script, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    skip_if_too_new(result.stderr)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.jax_only
@pytest.mark.parametrize(
    "backend, kind, sizes",
    [
        ("jax", "tf_saved_model", "any"),
        pytest.param("tensorflow", "tf_saved_model", "any", marks=pytest.mark.slow),
        pytest.param("tensorflow", "litert", "fixed", marks=pytest.mark.slow),
        ("tensorflow", "onnx", "any"),
    ],
)
def test_export(case, tmp_path, backend, kind, sizes):
    """Decoded by a process that knows neither Keras nor this package."""
    pytest.importorskip("tensorflow")
    if kind == "onnx":
        pytest.importorskip("tf2onnx")
        pytest.importorskip("onnxruntime")
    suffix = {"litert": ".tflite", "onnx": ".onnx"}.get(kind, "")
    path = tmp_path / f"decoder{suffix}"
    run_script(EXPORT, case.path, path, kind, sizes, KERAS_BACKEND=backend)
    script = f"""
import json, sys
sys.modules.update(dict.fromkeys(["keras", "jax", "keras_kvcache"]))  # not to be found
import numpy as np
path = sys.argv[1]
{RUNTIMES[kind]}
{inspect.getsource(decode)}
prompts, lengths = np.array({PROMPTS.tolist()}, "int32"), np.array({LENGTHS.tolist()})
lengths = lengths.astype("int32")
print(json.dumps(decode(step, prompts, lengths, **{ARGUMENTS})))
"""
    assert json.loads(run_script(script, path)) == case.expected


@pytest.mark.jax_only
def test_exported_for_any_length_without_a_cache():
    """A soft cap keeps Keras' fused kernel, which knows such lengths, out of it."""
    import jax
    from jax import export

    layer = cases.make_layer(4, 6, logit_soft_cap=2.0)
    sizes = export.symbolic_shape("batch, length")
    program = export.export(jax.jit(lambda x: layer(x, x, use_causal_mask=True)))(
        jax.ShapeDtypeStruct((*sizes, cases.D), "float32")
    )
    for rows, length in ((1, 1), (3, 13)):
        x = cases.noise(rows, length, cases.D)
        expected = layer(x, x, use_causal_mask=True)
        np.testing.assert_allclose(program.call(x), expected, atol=1e-5)
