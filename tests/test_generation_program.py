"""What JAX makes of the decode loop: the caches are donated and never copied."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import make_lm
from program_cases import IN_PLACE, RESULT, written

from keras_kvcache.attention.online_softmax import BLOCK
from keras_kvcache.caches import Rolling
from keras_kvcache.generation.buckets import CHUNKS
from keras_kvcache.runtime import platform

pytestmark = pytest.mark.jax_only

S = 4099
SHAPED = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|transpose|concatenate|broadcast)\(")


def test_layers_that_are_alike_are_traced_once():
    lm = make_lm(num_layers=3)
    cache = lm.generator.init_cache(2, 61)
    program = lm.generator.lower(cache).as_text()
    assert program.count("func.func private @_cached_attention") == 1
    assert program.count("call @_cached_attention") == 3


# For each cache the most temporaries, as a part of what a layer's takes, and the most
# slots whose keys are copied. Where a block is made floats of it's much of few bytes.
CACHES = {
    "head_major": ({}, 0.2, 255),
    "dense": ({"layout": "dense"}, 0.45, 1024),
    "rolling": ({"kind": Rolling(S)}, 0.2, 255),
    "bfloat16": ({"codec": "bfloat16"}, 0.6, 512),
    "int8": ({"codec": "int8"}, 0.6, 512),
    "int4": ({"codec": "int4"}, 1.1, 512),
    "rolling_float16": ({"kind": Rolling(S), "codec": "float16"}, 0.6, 512),
    "rolling_int8": ({"kind": Rolling(S), "codec": "int8"}, 0.6, 512),
}


# One row and several, shared heads and none, with each of the caches used most.
CASES = [
    (batch_size, num_key_value_heads, name)
    for batch_size in (1, 3)
    for num_key_value_heads in (2, 6)
    for name in CACHES
    if name in ("head_major", "dense") or (batch_size, num_key_value_heads) == (3, 6)
]


@pytest.mark.parametrize("batch_size, num_key_value_heads, name", CASES)
def test_decode_loop_holds_no_copy_of_a_cache(batch_size, num_key_value_heads, name):
    lm = make_lm(
        num_layers=2,
        num_key_value_heads=num_key_value_heads,
        head_dim=38,  # so that a slot's entries outweigh its scores
        max_sequence_length=S,
    )
    options, temporaries, slots = CACHES[name]
    cache = lm.generator.init_cache(batch_size, S, **options)
    program = lm.generator.lower(cache).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * cache[0].nbytes
    assert memory.temp_size_in_bytes < temporaries * cache[0].nbytes
    large = batch_size * num_key_value_heads * slots * lm.head_dim
    found = SHAPED.findall(program.as_text())
    assert found, "there is always a small one"
    sizes = [
        (operation, shape)
        for shape, operation in found
        if np.prod([int(axis) for axis in shape.split(",")]) > large
        # The embedding's transpose is a view within the product with it.
        and str(lm.vocabulary_size) not in shape.split(",")
    ]
    assert not sizes


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decode_loop_writes_its_tokens_in_place(batch_size):
    lm = make_lm(num_layers=2, max_sequence_length=S)
    program = lm.generator.lower(lm.generator.init_cache(batch_size, S)).compile()
    results = [RESULT.search(line) for line in written(program.as_text())]
    shape = f"s32[{batch_size},{CHUNKS[-1]}]"
    operations = {match[2] for match in results if match and shape in match[1]}
    assert operations & {"dynamic-update-slice", "scatter"}, "a token is written"
    # What a fusion writes is its root, which is among them.
    assert operations <= {*IN_PLACE, "fusion"}


@pytest.mark.parametrize("layout", ["head_major", "dense"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_prefill_scores_a_block_and_speaks_of_the_last_position(batch_size, layout):
    lm = make_lm(num_layers=2, max_sequence_length=S)
    chunk, vocabulary = 512, lm.vocabulary_size
    cache = lm.generator.init_cache(batch_size, S, layout=layout)
    program = lm.generator.lower(cache, chunk=chunk).compile()
    block = 4 * batch_size * lm.num_query_heads * chunk * BLOCK
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * cache[0].nbytes
    assert memory.temp_size_in_bytes < 5 * block
    shapes = {
        tuple(int(axis) for axis in shape.split(","))
        for shape in re.findall(r"= f32\[([\d,]+)\]", program.as_text())
    }
    # Scores of a block there are, and of no more slots.
    scores = [shape for shape in shapes if 4 * np.prod(shape) >= block]
    scores = [shape for shape in scores if lm.head_dim not in shape]
    assert scores and all(shape[-1] == BLOCK for shape in scores)
    assert any(vocabulary in shape for shape in shapes)
    assert not any(vocabulary in shape and chunk in shape for shape in shapes)


@pytest.mark.parametrize("features", [["sse2", "avx2"], ["avx2", "avx512f"], []])
def test_programs_use_the_widest_vectors_there_are(features, monkeypatch):
    """They are told so, as a word that XLA doesn't know comes back as an error."""
    monkeypatch.setattr(platform, "cpu_features", lambda: frozenset(features))
    options = platform.compiler_options()
    assert bool(options) == ("avx512f" in features)
    unknown = {f"{name}_unheard_of": width for name, width in (options or {}).items()}
    target = "keras_kvcache.generation.program.compiler_options"
    monkeypatch.setattr(target, lambda: unknown)
    if not options:
        make_lm().generate([1, 2, 3], max_new_tokens=3)
        return
    with pytest.raises(RuntimeError, match="xla_cpu_prefer_vector_width_unheard_of"):
        make_lm().generate([1, 2, 3], max_new_tokens=3)


@pytest.mark.parametrize(
    "policy, there_is_one, expected",
    [
        ("float32", True, "bfloat16"),
        ("float32", False, "float32"),
        ("float16", True, "float16"),
        ("mixed_bfloat16", True, "mixed_bfloat16"),
    ],
)
def test_accelerators_prefer_bfloat16(policy, there_is_one, expected, monkeypatch):
    monkeypatch.setattr(platform, "is_accelerator", lambda: there_is_one)
    monkeypatch.setattr(keras.config, "dtype_policy", lambda: keras.DTypePolicy(policy))
    assert platform.preferred_dtype() == expected


def test_what_a_processor_has_is_read_where_the_system_tells():
    features = platform.cpu_features()
    assert bool(features) == Path("/proc/cpuinfo").exists()
    assert all(re.fullmatch(r"[\w.]+", feature) for feature in features)
