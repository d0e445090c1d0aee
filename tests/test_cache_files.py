"""Caches in files: every bit comes back, and nothing else is taken for them."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import tracemalloc
import zlib

import attention_cases as cases
import jax
import keras
import numpy as np
import pytest
from conftest import make_lm, shared_lm
from keras import ops
from safetensors import safe_open
from safetensors.numpy import save_file

from keras_kvcache.caches import (
    CODECS,
    DTYPES,
    CacheSpec,
    Exact,
    Rolling,
    Static,
    StaticCache,
    files,
    load_caches,
    resize,
    resize_window,
    save_caches,
    take_rows,
    with_end,
)

B, K, H, HV, S = 3, 2, 7, 5, 37
KINDS = {"static": Static(), "rolling": Rolling(11), "sinks": Rolling(13, sinks=3)}


def random_bits(cache, seed=0):
    """The cache with any bits at all in its arrays; some are no numbers."""
    random = np.random.default_rng(seed)

    def fill(array):
        like = ops.convert_to_numpy(array)
        bits = random.integers(0, 256, like.nbytes, dtype="uint8")
        return ops.convert_to_tensor(bits.view(like.dtype).reshape(like.shape))

    return jax.tree_util.tree_map(fill, cache)


def bits(cache):
    """What a tree of caches is made of, and the bytes in it."""
    arrays, form = jax.tree_util.tree_flatten(cache)
    arrays = [ops.convert_to_numpy(array) for array in arrays]
    return form, [(array.dtype.name, array.tobytes()) for array in arrays]


def make_cache(**options):
    options = {"codec": "int4", "kind": Rolling(11, sinks=3), **options}
    return random_bits(CacheSpec(B, S, K, H, **options).allocate())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec, layout", cases.stored([*DTYPES, *CODECS]))
def test_every_bit_comes_back(tmp_path, codec, layout, kind):
    spec = CacheSpec(
        B, 300, K, H, value_dim=HV, codec=codec, layout=layout, kind=KINDS[kind]
    )
    cache = random_bits(spec.allocate())
    save_caches(tmp_path / "cache", cache, 29)
    loaded, fill = load_caches(tmp_path / "cache")
    assert bits(loaded) == bits(cache)
    assert type(loaded) is type(cache) and loaded.codec == cache.codec
    assert (fill, type(fill)) == (29, int)
    for array in jax.tree_util.tree_leaves(loaded):
        assert ops.is_tensor(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_tensor_is_a_cache(tmp_path, dtype):
    tensor = ops.convert_to_tensor(cases.noise(B, 2, S, K, H), dtype)
    save_caches(tmp_path / "cache", tensor, S)
    loaded, _ = load_caches(tmp_path / "cache")
    assert ops.is_tensor(loaded)
    assert bits(loaded) == bits(tensor)


def test_an_array_whose_memory_is_out_of_order(tmp_path):
    """The format takes memory as it lies, which for a transposed array is another."""
    array = cases.noise(B, S, K, H, 2).transpose(0, 4, 1, 2, 3)
    save_caches(tmp_path / "cache", array, S)
    loaded, _ = load_caches(tmp_path / "cache")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded), array)


def test_a_tree_of_unlike_caches(tmp_path):
    tensor = ops.convert_to_tensor(cases.noise(B, 2, S, K, H))
    caches = (
        make_cache(),
        [make_cache(codec="int8", kind="static"), (tensor,)],
        make_cache(codec=Exact("bfloat16"), layout="dense"),
    )
    fill = np.array([0, 37, 5])
    save_caches(tmp_path / "new" / "folder" / "cache", caches, fill)
    loaded, loaded_fill = load_caches(tmp_path / "new" / "folder" / "cache")
    assert bits(loaded) == bits(caches)
    assert keras.backend.standardize_dtype(loaded_fill.dtype) == "int32"
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded_fill), fill)


def test_what_the_verbs_give_can_be_saved(tmp_path):
    """They change sizes, and cut segments another way or not at all."""
    cache = make_cache(codec="bfloat16", layout="dense")
    for changed in (
        take_rows(cache, [2, 0, 1, 1]),
        resize(make_cache(codec="float32", kind="static"), 601, 3),
        resize_window(cache, 17, 3),
        with_end(cache, ops.convert_to_tensor([1, 2, 3], "int32")),
    ):
        save_caches(tmp_path / "cache", changed, 3)
        assert bits(load_caches(tmp_path / "cache")[0]) == bits(changed)


@pytest.mark.parametrize("fill", [0, 37, np.int64(5), np.array(5), [0, 5, 37]])
def test_fills(tmp_path, fill):
    save_caches(tmp_path / "cache", make_cache(codec="int8", kind="static"), fill)
    loaded = load_caches(tmp_path / "cache")[1]
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded), fill)
    assert isinstance(loaded, int) == (np.ndim(fill) == 0)


def test_a_rolling_cache_has_no_end(tmp_path):
    save_caches(tmp_path / "cache", make_cache(), 10**6)
    assert load_caches(tmp_path / "cache")[1] == 10**6


PROMPTS = np.array(
    [[3, 1, 4, 1, 5, 9, 2], [5, 8, 9, 7, 9, 3, 2], [2, 7, 1, 8, 2, 8, 1]]
)
LENGTHS = [4, 7, 6]
STEPS = 18  # past the window, and past a group of `int4`


def layer_caches(lm):
    """One of each for the three layers of the model with a window of 11."""
    spec = dict(batch_size=B, capacity=64, num_key_value_heads=K, head_dim=lm.head_dim)
    return (
        CacheSpec(**spec, codec="int4", kind=Rolling(11)).allocate(),
        CacheSpec(**spec, codec="int8").allocate(),
        ops.zeros((B, 2, 64, K, lm.head_dim), "bfloat16"),
    )


@pytest.fixture(scope="module")
def call():
    """One step of the model, which compiles once for all tests."""
    return cases.compiled(shared_lm("windowed").call_with_cache)


def go_on(call, caches, fill, logits, steps):
    """Greedy tokens `(B, steps)`, with what it takes to go on after them."""
    tokens = []
    for _ in range(steps):
        tokens.append(np.argmax(ops.convert_to_numpy(logits), axis=-1))
        step, _, caches = call(ops.convert_to_tensor(tokens[-1][:, None]), caches, fill)
        logits, fill = step[:, 0], fill + 1
    return np.stack(tokens, axis=1), caches, fill, logits


def start(call, caches):
    """The prompts, read: caches, fill and the logits of the next token."""
    zeros = ops.zeros((B,), "int32")
    logits, _, caches = call(ops.convert_to_tensor(PROMPTS), caches, zeros)
    logits = ops.convert_to_numpy(logits)[np.arange(B), np.array(LENGTHS) - 1]
    return caches, ops.convert_to_tensor(LENGTHS, "int32"), logits


def test_generation_goes_on(tmp_path, call):
    """Token for token as if nothing had been saved, wherever the text is cut."""
    lm = shared_lm("windowed")
    state = start(call, layer_caches(lm))
    expected = go_on(call, *state, STEPS)[0]
    assert len(np.unique(expected)) > STEPS / 2
    for first in (0, 5):
        tokens, caches, fill, logits = state_after(call, state, first)
        save_caches(tmp_path / "cache", caches, fill, lm)
        caches, fill = load_caches(tmp_path / "cache", lm)
        rest = go_on(call, caches, fill, logits, STEPS - first)[0]
        np.testing.assert_array_equal(np.concatenate([tokens, rest], 1), expected)


def state_after(call, state, steps):
    if steps == 0:
        return np.zeros((B, 0), int), *state
    return go_on(call, *state, steps)


@pytest.mark.jax_only
def test_loaded_caches_can_be_donated(tmp_path):
    """A donated buffer is written in place: it must be nobody else's."""
    cache = random_bits(CacheSpec(B, S, K, H).allocate())
    save_caches(tmp_path / "cache", cache, 5)

    def negate(cache):
        return jax.tree_util.tree_map(lambda array: -array, cache)

    in_place = jax.jit(negate, donate_argnums=0)
    for _ in range(2):
        loaded, _ = load_caches(tmp_path / "cache")
        assert bits(in_place(loaded)) == bits(negate(cache))
    assert bits(load_caches(tmp_path / "cache")[0]) == bits(cache)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest  # before TensorFlow, for PyTorch's sake
import keras, keras_kvcache, numpy as np
from keras_kvcache.caches import load_caches, save_caches
from test_cache_files import go_on
folder = sys.argv[2]
lm = keras_kvcache.DecoderLM.from_preset(folder)
caches, fill = load_caches(folder + "/cache", lm)
save_caches(folder + "/again", caches, fill, lm)
logits = np.load(folder + "/logits.npy")
np.save(folder + "/tokens", go_on(lm.call_with_cache, caches, fill, logits, 9)[0])
print(keras.backend.backend())
"""


@pytest.mark.slow
@pytest.mark.jax_only
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_another_backend_goes_on(tmp_path, call, backend):
    """Files know no backend: bits, tokens and the model's fingerprint are the same."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} isn't installed")
    lm = shared_lm("windowed")
    lm.save_to_preset(tmp_path)
    caches, fill, logits = start(call, layer_caches(lm))
    save_caches(tmp_path / "cache", caches, fill, lm)
    np.save(tmp_path / "logits", logits)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), tmp_path],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == backend
    assert bits(load_caches(tmp_path / "again", lm)) == bits((caches, fill))
    expected = go_on(call, caches, fill, logits, 9)[0]
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), expected)


# Models.


def tiny_lm(**options):
    constant = keras.initializers.Constant(0.1)  # Random ones take longer to compile.
    small = dict(num_layers=1, num_query_heads=2, kernel_initializer=constant)
    return make_lm(**{**small, **options})


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture
def path(tmp_path, lm):
    save_caches(tmp_path / "cache", make_cache(), 5, lm)
    return tmp_path / "cache"


def test_the_same_model_under_another_name(path, lm):
    other = tiny_lm(name="other")
    assert other.name != lm.name
    assert load_caches(path, other)[1] == 5


def test_no_model_takes_any_file(path):
    assert load_caches(path)[1] == 5


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="bfloat16"),
        dict(vocabulary_size=103),
        dict(query_key_norm=True),
        dict(kernel_initializer="ones"),
        # What no weight tells.
        dict(sliding_window=5),
        dict(rope_max_wavelength=1009),
        dict(final_logit_soft_cap=31.0),
    ],
    ids=str,
)
def test_another_model_is_refused(path, options):
    with pytest.raises(ValueError, match="cache can't be loaded. `model` must be the"):
        load_caches(path, tiny_lm(**options))


def test_a_training_step_makes_another_model(path):
    lm = tiny_lm()
    load_caches(path, lm)
    lm.compile(optimizer=keras.optimizers.SGD(1e-3))
    lm.train_on_batch(PROMPTS, PROMPTS)
    with pytest.raises(ValueError, match="its weights the same"):
        load_caches(path, lm)


def dense_model(*names, shape=(3, 7), dtype="float32"):
    options = dict(kernel_initializer="zeros", dtype=dtype)
    layers = [keras.layers.Dense(shape[1], name=name, **options) for name in names]
    return keras.Sequential([keras.Input(shape[:1]), *layers])


def test_any_weight_counts():
    """Its name, its order and every value."""
    models = [
        dense_model("one", "two"),
        dense_model("one", "three"),
        dense_model("two", "one"),
        dense_model("one", "two", shape=(7, 7)),
    ]
    for model in models:
        for weight in model.weights:
            weight.assign(np.ones(weight.shape))
    found = files.fingerprint(models[0])
    for weight in models[0].weights:
        for place in np.ndindex(*weight.shape):
            changed = np.ones(weight.shape)
            changed[place] = 1.001
            weight.assign(changed)
            assert files.fingerprint(models[0]) != found
        weight.assign(np.ones(weight.shape))
    assert files.fingerprint(models[0]) == found
    models += [
        dense_model("one", "two", dtype=name) for name in ("float16", "bfloat16")
    ]
    assert len({files.fingerprint(model) for model in models}) == len(models)


def test_names_that_keras_makes_up_do_not_count():
    """Those of inputs; a layer's own is that of its weights."""

    def make(activation):
        inputs = keras.Input((3,))
        dense = keras.layers.Dense(2, activation, kernel_initializer="ones", name="d")
        return keras.Model(inputs, dense(inputs))

    first, second, other = (make(name) for name in ("relu", "relu", "tanh"))
    assert first.inputs[0].name != second.inputs[0].name
    assert files.fingerprint(first) == files.fingerprint(second)
    assert files.fingerprint(first) != files.fingerprint(other)


def test_a_model_that_keras_can_not_describe():
    """Its weights tell it from others."""

    class Own(keras.Model):
        def __init__(self, dense):
            super().__init__()
            self.dense = dense

        def get_config(self):
            raise NotImplementedError

        def call(self, x):
            return self.dense(x)

    ones, again, twos = (
        Own(keras.layers.Dense(3, kernel_initializer=initializer, name="dense"))
        for initializer in ("ones", "ones", keras.initializers.Constant(2.0))
    )
    for model in (ones, again, twos):
        model(np.ones((1, 2)))
    assert files.fingerprint(ones) == files.fingerprint(again)
    assert files.fingerprint(ones) != files.fingerprint(twos)


def test_a_file_without_a_model_is_refused_with_one(tmp_path, lm):
    save_caches(tmp_path / "cache", make_cache(), 5)
    with pytest.raises(ValueError, match="in the file None"):
        load_caches(tmp_path / "cache", lm)


@pytest.mark.parametrize("verb", ["save", "load"])
def test_what_is_no_model(path, verb):
    def use(model):
        if verb == "save":
            return save_caches(path, make_cache(), 5, model)
        return load_caches(path, model)

    with pytest.raises(TypeError, match="`model` must be a keras.Model. Received: 'lm"):
        use("lm")
    with pytest.raises(ValueError, match="`model` must be built"):
        use(keras.Sequential([keras.layers.Dense(3)]))


# What can't be saved.


@pytest.mark.parametrize(
    "fill, words",
    [
        (-1, "from 0 to the capacity"),
        (38, "Received: 38"),
        ([1, 2, -3], r"Received: \[1, 2, -3\]"),
        ([1, 2, 38], "3 rows"),
        ([1, 2], "3 rows"),
        ([[1, 2, 3]], "an integer, or one for each of 3 rows"),
        ([], "an integer, or one for each of 3 rows"),
        ([[1], 2, 3], "an integer, or one for each of 3 rows"),
        (1.0, "an integer, or one for each of 3 rows"),
        (True, "an integer, or one for each of 3 rows"),
        (None, "an integer, or one for each of 3 rows"),
        ("5", "an integer, or one for each of 3 rows"),
        (2**70, "an integer, or one for each of 3 rows"),
    ],
)
def test_fills_that_do_not_fit(tmp_path, fill, words):
    caches = (make_cache(), make_cache(codec="int8", kind="static"))
    with pytest.raises(ValueError, match=words):
        save_caches(tmp_path / "cache", caches, fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.jax_only
def test_a_traced_fill_is_refused(tmp_path):
    cache = make_cache()
    with pytest.raises(ValueError, match="no tracer"):
        jax.jit(lambda fill: save_caches(tmp_path / "cache", cache, fill))(3)


@pytest.mark.parametrize("caches", [None, "cache", 3, (make_cache, 3), {"a": None}])
def test_what_is_no_cache(tmp_path, caches):
    with pytest.raises(TypeError, match="`caches` must be a cache, a dense tensor"):
        save_caches(tmp_path / "cache", caches, 3)


def test_no_caches(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        save_caches(tmp_path / "cache", (), 3)


@pytest.mark.parametrize(
    "tensor, words",
    [
        (np.zeros((B, 2, S, K), "float32"), "5 axes"),
        (np.zeros((B, 3, S, K, H), "float32"), "keys and values = 2"),
        (np.zeros((B, 2, S, K, H), "int8"), "`dtype` must be one of"),
    ],
)
def test_what_is_no_dense_cache(tmp_path, tensor, words):
    with pytest.raises(ValueError, match=words):
        save_caches(tmp_path / "cache", (make_cache(), tensor), 3)


def test_a_cache_of_ones_own_making(tmp_path):
    """What loading couldn't bring back isn't written."""
    storage = CacheSpec(B, 300, K, H).allocate().storage.merge()
    with pytest.raises(ValueError, match="as `CacheSpec.allocate` makes them"):
        save_caches(tmp_path / "cache", StaticCache(storage), 3)

    class Own(StaticCache):
        pass

    with pytest.raises(TypeError, match="Own"):
        save_caches(tmp_path / "cache", Own(storage), 3)


def fail_after(path, number):
    def save(arrays, staged, metadata):
        save_file(arrays, staged, metadata)
        with open(staged, "r+b") as file:
            file.truncate(number)
        raise OSError("No space left on device")

    return save


@pytest.mark.parametrize("fails", ["save_file", "replace"])
def test_an_error_leaves_the_earlier_file(path, monkeypatch, fails):
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if fails == "save_file":
            patch.setattr("safetensors.numpy.save_file", fail_after(path, 100))
        else:
            patch.setattr(os, "replace", lambda *paths: os.stat(path / "no folder"))
        with pytest.raises(OSError):
            save_caches(path, make_cache(codec="int8"), 7)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["cache"]
    save_caches(path, make_cache(codec="int8"), 7)
    assert load_caches(path)[1] == 7
    assert [file.name for file in path.parent.iterdir()] == ["cache"]


# What can't be loaded.


def refused(path, *words):
    """Checks that a file is refused by a message that names it."""
    with pytest.raises(ValueError) as caught:
        load_caches(path)
    message = str(caught.value)
    for word in (str(path), "Received:", *words):
        assert word in message, message


def rewrite(path, change, **metadata):
    """Writes a file anew, as someone with ill will would: its checksums are right.

    Args:
        change: Function of the arrays by name and the description, which it may
            change.
    """
    with safe_open(path, framework="numpy") as file:
        held = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    description = json.loads(held["description"])
    text = change(arrays, description) or json.dumps(description)
    held = {**held, "description": text, **metadata}
    held["checksum"] = f"{zlib.crc32(text.encode()):08x}"
    save_file(arrays, path, held)


def spec_in(description):
    return description["caches"]["cache"]


def test_rewriting_alone_does_no_harm(path):
    expected = bits(load_caches(path))
    rewrite(path, lambda arrays, description: None)
    assert bits(load_caches(path)) == expected


def small_file(tmp_path):
    cache = random_bits(CacheSpec(1, 2, 1, 3, codec="int8").allocate())
    save_caches(tmp_path / "small", (cache, cache), 1)
    return tmp_path / "small", (tmp_path / "small").read_bytes()


def test_truncated_files(tmp_path):
    path, whole = small_file(tmp_path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


def test_any_flipped_bit_is_found(tmp_path):
    path, whole = small_file(tmp_path)
    for place in range(len(whole)):
        bit = 1 << place % 8
        damaged = bytes([*whole[:place], whole[place] ^ bit, *whole[place + 1 :]])
        path.write_bytes(damaged)
        refused(path)


@pytest.mark.parametrize("content", [b"", b"cache", b"\0" * 99, b"\x80\x04]\x94."])
def test_files_of_something_else(tmp_path, content):
    (tmp_path / "cache").write_bytes(content)
    refused(tmp_path / "cache", "whole")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_something_else(tmp_path, metadata):
    save_file({"a": np.zeros(3)}, tmp_path / "cache", metadata)
    refused(tmp_path / "cache", "must be a file that `save_caches` wrote")


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "cache"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_caches(path)


def test_another_version(path):
    rewrite(path, lambda *_: None, **{"keras_kvcache.caches": "2"})
    refused(path, "format version 3", "'2'")


def test_a_file_of_before_the_residual_was_called_so(tmp_path):
    spec = CacheSpec(2, 41, 3, 7, codec="int4")
    save_caches(tmp_path / "cache", spec.allocate(), fill=0)

    def rename(arrays, description):
        for name in list(arrays):
            arrays[name.replace("residual", "newest")] = arrays.pop(name)

    rewrite(tmp_path / "cache", rename)
    with safe_open(tmp_path / "cache", framework="numpy") as file:
        assert any("newest" in name for name in file.keys())
    loaded, fill = load_caches(tmp_path / "cache")
    assert fill == 0 and loaded.residual.start.shape == (2,)


def drop(arrays, description):
    arrays.pop("caches.end")


def add(arrays, description):
    arrays["caches.more"] = np.zeros(3, "int32")


def reshape(arrays, description):
    arrays["caches.end"] = arrays["caches.end"][:, None]


def narrow(arrays, description):
    arrays["caches.end"] = arrays["caches.end"].astype("int16")


def widen(arrays, description):
    arrays["caches.end"] = arrays["caches.end"].astype("int64")


@pytest.mark.parametrize(
    "change, words",
    [
        (drop, ["missing ['caches.end']"]),
        (add, ["left over ['caches.more']"]),
        (reshape, ["caches.end must have the shape (3,)", "(3, 1)"]),
        (narrow, ["dtype int32", "int16"]),
        (widen, ["one of the dtypes", "int32", "I64"]),
    ],
)
def test_arrays_that_do_not_fit(path, change, words):
    rewrite(path, change)
    refused(path, *words)


SIZES = ("batch_size", "num_key_value_heads", "head_dim", "value_dim")


@pytest.mark.parametrize("value", [0, -3, 4, 2.0, True, None, "3", [], 2**60, 1e999])
@pytest.mark.parametrize("name", [*SIZES, "window", "sinks"])
def test_sizes_that_do_not_fit(path, name, value):
    """One that isn't what the arrays are of is refused, whatever it is."""
    if (name, value) == ("value_dim", None):
        pytest.skip("is that of keys, as here")

    def change(arrays, description):
        spec = spec_in(description)
        owner = spec["kind"] if name in ("window", "sinks") else spec
        assert type(owner[name]) is not type(value) or owner[name] != value
        owner[name] = value

    if (name, value) == ("window", 4):
        value = 47  # a ring of whole groups is as large for a few other windows
    rewrite(path, change)
    refused(path)


@pytest.mark.parametrize("value", [0, 33, 2**60, 10**4000, "37"])
def test_a_capacity_that_does_not_fit(tmp_path, value):
    save_caches(tmp_path / "cache", make_cache(codec="int8", kind="static"), 5)

    def change(arrays, description):
        spec_in(description)["capacity"] = value

    rewrite(tmp_path / "cache", change)
    refused(tmp_path / "cache")


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("codec", {"name": "int3", "dtype": "float32"}, "`codec` must be one of"),
        ("codec", {"name": ["int4"], "dtype": "float32"}, "`codec` must be one of"),
        ("codec", {"name": "int4", "dtype": "int8"}, "`dtype` must be one of"),
        ("codec", {"name": "int4", "group": 3}, "group"),
        ("codec", {"name": "int8", "dtype": "float32"}, "missing"),
        ("codec", {"dtype": "float32"}, "name"),
        ("codec", "int4", "`codec` must be described"),
        ("kind", {"name": "static"}, "left over"),
        ("kind", {"name": "rolling"}, "window"),
        ("kind", {"name": "os.system", "command": "true"}, "`kind` must be one of"),
        ("layout", "dense", "must be 'head_major' for the codec"),
        ("layout", "sparse", "`layout` must be one of"),
        ("layout", ["dense"], "unhashable"),
        ("more", 3, "more"),
    ],
)
def test_descriptions_that_do_not_fit(path, option, value, words):
    rewrite(path, lambda _, description: spec_in(description).update({option: value}))
    refused(path, words)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"caches": {}}',
        '{"caches": null, "fill": 5}',
        '{"caches": {"dict": {}}, "fill": 5}',
        '{"caches": {"tuple": []}, "fill": 5}',
        '{"caches": {"tuple": "cache"}, "fill": 5}',
        '{"caches": {"cache": []}, "fill": 5}',
        '{"caches": {"cache": {}}, "fill": 5}',
        '{"caches": {"tensor": {}}, "fill": 5}',
        '{"caches": {"tensor": {"shape": 3, "dtype": "float32"}}, "fill": 5}',
        '{"caches": ' + '{"list": [' * 10**5 + "]}" * 10**5 + "}",
        '{"caches": ' + "[" * 10**6,
    ],
    ids=lambda text: text[:40],
)
def test_descriptions_of_nothing(path, text):
    rewrite(path, lambda *_: text or " ")
    refused(path)


@pytest.mark.parametrize("key", ["caches", "fill", "model", "checksum"])
def test_descriptions_that_lack_something(path, lm, key):
    rewrite(path, lambda _, description: description.pop(key) and None)
    with pytest.raises(ValueError, match=key):
        load_caches(path, lm)


def test_metadata_that_lack_something(path):
    with safe_open(path, framework="numpy") as file:
        held, arrays = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}
    for key in ("description", "checksum"):
        rest = {name: text for name, text in held.items() if name != key}
        save_file(arrays, path, rest)
        refused(path, key)


@pytest.mark.parametrize(
    "shape, words",
    [
        ([3, 2, 36, 2, 7], "caches must have the shape (3, 2, 36, 2, 7)"),
        ([3, 2, 41, 2, 7], "bytes"),
        ([3, 2, 37], "caches must have the shape (3, 2, 37)"),
        ([3, 2, -37, 2, 7], "positive integers"),
        ([3, 2, 37.0, 2, 7], "positive integers"),
        (["3", 2, 37, 2, 7], "positive integers"),
        (37, "not iterable"),
    ],
)
def test_a_tensor_of_another_shape(tmp_path, shape, words):
    path = tmp_path / "cache"
    save_caches(path, cases.noise(B, 2, S, K, H), 5)

    def change(arrays, description):
        description["caches"]["tensor"]["shape"] = shape

    rewrite(path, change)
    refused(path, words)


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((3, 2, 37, 14), "float32", "5 axes"),
        ((3, 1, 37, 4, 7), "float32", "keys and values = 2"),
        ((3, 2, 37, 2, 7), "int8", "`dtype` must be one of"),
    ],
)
def test_a_tensor_that_is_no_cache(tmp_path, shape, dtype, words):
    path = tmp_path / "cache"
    save_caches(path, cases.noise(B, 2, S, K, H), 5)

    def change(arrays, description):
        arrays["caches"] = np.zeros(shape, dtype)
        description["caches"]["tensor"] = {"shape": shape, "dtype": dtype}

    rewrite(path, change)
    refused(path, words)


def places_in(description, place=()):
    """Where a description has something, as tuples of keys."""
    yield place
    if isinstance(description, (dict, list)):
        keys = description if isinstance(description, dict) else range(len(description))
        for key in keys:
            yield from places_in(description[key], (*place, key))


JUNK = (None, True, -1, 0, 2**40, 0.5, 1e999, "", "float16", [], [3], {}, {"name": 3})


def test_any_value_anywhere(tmp_path):
    """Whatever a stranger writes, it's refused, or is what was there before."""
    path = tmp_path / "cache"
    caches = (make_cache(), cases.noise(B, 2, S, K, H))
    save_caches(path, caches, [1, 2, 3])
    before = path.read_bytes()
    found = {}
    rewrite(path, lambda _, description: found.update(description))
    places = [place for place in places_in(found) if place]
    assert len(places) > 25
    for place in places:
        for junk in JUNK:

            def change(arrays, description, place=place, junk=junk):
                for key in place[:-1]:
                    description = description[key]
                description[place[-1]] = junk

            path.write_bytes(before)
            rewrite(path, change)
            try:
                loaded, _ = load_caches(path)
            except ValueError as error:
                assert str(path) in str(error) and "Received:" in str(error)
            else:
                shapes = [a.shape for a in jax.tree_util.tree_leaves(loaded)]
                assert shapes == [a.shape for a in jax.tree_util.tree_leaves(caches)]


@pytest.mark.parametrize("fill", [-1, 38, [1, 2], [1, 2, 3, 4], 5.0, True, None, "5"])
def test_a_fill_in_the_file_that_does_not_fit(tmp_path, fill):
    path = tmp_path / "cache"
    save_caches(path, make_cache(codec="int8", kind="static"), 5)
    rewrite(path, lambda _, description: description.update(fill=fill))
    refused(path, "`fill` must be")


def test_arrays_that_changed(path):
    def change(arrays, description):
        arrays["caches.end"][1] ^= 1

    rewrite(path, change)
    refused(path, "as they were written")


def test_a_hostile_file_takes_no_memory(path):
    """What it describes is compared with what there is before anything is made."""
    small = dict(spec=None)

    def many(arrays, description):
        small["spec"] = dict(description["caches"])
        description["caches"] = {"tuple": [small["spec"]] * 10**4}

    def large(arrays, description):
        spec_in(description).update(batch_size=2**40, head_dim=2**40)

    for change in (large, many):
        before = path.read_bytes()
        rewrite(path, change)
        tracemalloc.start()
        started = time.perf_counter()
        refused(path)
        seconds = time.perf_counter() - started
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < 20 and peak < 20 * path.stat().st_size + 2**20
        path.write_bytes(before)


@pytest.mark.jax_only
def test_a_dtype_that_the_backend_lacks(tmp_path):
    """JAX would turn float64 into float32 without a word."""
    path = tmp_path / "cache"
    save_caches(path, cases.noise(B, 2, S, K, H, dtype="float64"), 5)
    refused(path, "float64, which becomes float32")
