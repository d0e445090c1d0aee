"""Bad GGUF files: a ValueError that names the path, the rule and what was found."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_files import PRIMES, TOKENS, SmallFile, stored_shapes

from keras_kvcache.loaders import read_gguf
from keras_kvcache.loaders.gguf_header import read_header


@pytest.fixture
def small(tmp_path):
    return SmallFile(tmp_path)


def refuses(path, *words):
    with pytest.raises(ValueError) as caught:
        read_gguf(path)
    message = str(caught.value)
    for word in (str(path), *words):
        assert word in message, message


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.gguf"):
        read_gguf(tmp_path / "nothing.gguf")


def test_a_folder(tmp_path):
    refuses(tmp_path, "which is no file")


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4" + bytes(60)])
def test_wrong_magic(tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    refuses(path, "must begin with b'GGUF'", repr(content[:4]))


def test_every_cut_is_noticed(small):
    path = small()
    header = read_header(path)
    whole = Path(path).read_bytes()
    begin = min(info.offset for info in header.tensors.values())
    end = max(info.offset + info.size for info in header.tensors.values())
    for cut in [*range(4, begin, 3), *range(begin, end, 997), end - 1]:
        Path(path).write_bytes(whole[:cut])
        refuses(path, "cut short")


def test_damaged_headers_never_fail_otherwise(small):
    """A changed byte is refused with a ValueError or changes a harmless value."""
    path = Path(small())
    whole = path.read_bytes()
    begin = min(info.offset for info in read_header(path).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(4, begin)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("place", [8, 16])
@pytest.mark.parametrize("count", [2**32, 2**63, 2**64 - 1])
def test_huge_counts(small, place, count):
    path = Path(small())
    data = bytearray(path.read_bytes())
    data[place : place + 8] = struct.pack("<Q", count)
    path.write_bytes(data)
    refuses(path, "cut short", str(count))


def test_a_huge_array(small):
    path = Path(small())
    data = path.read_bytes()
    # The length of the token list lies between its item type and first string.
    count, first = struct.pack("<Q", len(TOKENS)), struct.pack("<Q", 5) + b"<unk>"
    assert data.count(count + first) == 1
    path.write_bytes(data.replace(count + first, struct.pack("<Q", 2**40) + first))
    # Refused at once: each string takes 8 bytes at least.
    refuses(path, "cut short", "tokenizer.ggml.tokens", str(8 * 2**40))


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions(small, version):
    path = Path(small())
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", version)
    path.write_bytes(data)
    refuses(path, "version", str(version), "(2, 3)")


def test_a_foreign_architecture(small):
    refuses(small(architecture="gemma"), "'gemma'", "('llama', ")


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
    ],
)
def test_missing_keys(small, key):
    refuses(small({key: None}), key, "missing")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.expert_count", 8, "mixtures of experts"),
        ("llama.attention.causal", False, "must be true"),
        ("llama.attention.scale", 0.5, "must be absent"),
        ("llama.logit_scale", 8.0, "must be absent"),
        ("llama.rope.scaling.type", "yarn", "'yarn'"),
        ("llama.attention.head_count_kv", 4, "multiple"),
        ("llama.attention.head_count_kv", [3, 3], "type int"),
        ("llama.attention.value_length", 8, "value_length"),
        ("llama.rope.dimension_count", 7, "even"),
        ("llama.rope.dimension_count", 12, "head size 10"),
        ("llama.rope.freq_base", 0.0, "positive"),
        ("llama.block_count", 3, "blk.2.attn_norm.weight"),
        ("llama.block_count", 2**31, "llama.block_count"),
        ("llama.block_count", 1, "blk.1.attn_norm.weight"),
        ("llama.attention.head_count", 2**31, "multiple"),
        ("llama.embedding_length", 11, "shape (29, 11)"),
        ("split.count", 2, "one file"),
        ("tokenizer.ggml.model", "t5", "'t5'"),
        ("tokenizer.ggml.tokens", ["a", "a"], "once"),
        ("tokenizer.ggml.eos_token_id", 29, "29"),
    ],
)
def test_metadata_that_cannot_be_honoured(small, key, value, words):
    refuses(small({key: value}), words)


@pytest.mark.parametrize("name", stored_shapes(**PRIMES))
def test_missing_tensors(small, name):
    refuses(small(tensor_changes={name: None}), name)


@pytest.mark.parametrize("name", stored_shapes(**PRIMES))
def test_misshaped_tensors(small, name):
    shape = stored_shapes(**PRIMES)[name]
    wrong = np.zeros((*shape[:-1], shape[-1] + 1), "float32")
    refuses(small(tensor_changes={name: wrong}), name, "shape")


def test_tensors_without_a_place_are_named(small):
    bias = np.zeros(60, "float32")
    refuses(small(tensor_changes={"blk.0.attn_q.bias": bias}), "blk.0.attn_q.bias")


def test_rope_factors_that_cannot_divide(small):
    factors = np.array([1, 2, 0, 4, 5], "float32")
    refuses(small(tensor_changes={"rope_freqs.weight": factors}), "positive", "0.0")


def test_more_tokens_than_embeddings(small):
    tokens = [*TOKENS, "more"]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [1] * len(tokens),
    }
    refuses(small(changes), "29 rows", "30 tokens")
