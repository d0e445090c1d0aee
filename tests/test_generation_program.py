"""What JAX makes of the decode loop: the caches are donated and never copied."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_lm
from program_cases import IN_PLACE, RESULT, count_attentions, made, written

from keras_kvcache.attention.softmax import BLOCK
from keras_kvcache.caches import Rolling
from keras_kvcache.generation.buckets import CHUNKS
from keras_kvcache.runtime import platform

pytestmark = pytest.mark.jax_only

S = 4099
COPIES = ("copy", "transpose", "concatenate", "broadcast")


def test_layers_that_are_alike_are_traced_once():
    def count(**options):
        lm = make_lm("windowed", **options)
        cache = lm.generator.init_cache(2, 61, kind="static")
        return count_attentions(lm.generator.lower(cache))

    one = count(num_layers=1)
    assert one > 0 and count(num_layers=3) == one
    # Every other layer sees all: two kinds are more than one, however many layers.
    both = count(num_layers=2, sliding_window_pattern=2)
    assert one < both == count(num_layers=4, sliding_window_pattern=2)


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
    assert made(program, COPIES, 1), "there is always a small one"
    large = batch_size * num_key_value_heads * slots * lm.head_dim + 1
    vocabulary = str(lm.vocabulary_size)
    # The embedding's transpose is a view within the product with it.
    assert not [
        shape
        for _, shape in made(program, COPIES, large)
        if vocabulary not in shape.split(",")
    ]


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


@pytest.mark.parametrize(
    "features, options",
    [
        (["sse2", "avx2"], None),
        (["avx2", "avx512f"], {"xla_cpu_prefer_vector_width": 512}),
        ([], None),
    ],
)
def test_wide_vectors_are_asked_for_where_there_are_such(
    features, options, monkeypatch
):
    monkeypatch.setattr(platform, "cpu_features", lambda: frozenset(features))
    assert platform.compiler_options() == options


def test_generation_hands_its_options_to_xla(monkeypatch):
    """A word that XLA doesn't know comes back as an error."""
    target = "keras_kvcache.generation.program.compiler_options"
    monkeypatch.setattr(target, lambda: {"xla_cpu_unheard_of": 512})
    with pytest.raises(RuntimeError, match="xla_cpu_unheard_of"):
        make_lm(num_layers=1).generate([1, 2, 3], max_new_tokens=3)


# Of an x86 and of an ARM processor, as Linux prints them.
CPUINFO = {
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 avx2 sha_ni\n"
    "bugs\t\t: sysret_ss_attrs\n\nprocessor\t: 1\nflags\t\t: fpu\n": {
        "fpu",
        "sse2",
        "avx2",
        "sha_ni",
    },
    "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd sve\n": {
        "fp",
        "asimd",
        "sve",
    },
    "processor\t: 0\nhart\t: 1\nisa\t: rv64imafdc\n": set(),
    None: set(),
}


@pytest.mark.parametrize("text, features", CPUINFO.items(), ids=["x86", "arm", "?", ""])
def test_features_of_a_processor_are_read_from_the_system(
    text, features, tmp_path, monkeypatch
):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(platform, "Path", lambda _: Path(path))
    assert platform.cpu_features() == features
