"""GGUF files as checkpoints, against files written here and NumPy."""

import struct

import gguf
import numpy as np
import pytest
from gguf_files import BLOCKS, PRIMES, SmallFile, metadata, random_tensors, write

from keras_kvcache.loaders import read_gguf
from keras_kvcache.loaders.gguf_header import read_header

Q = gguf.GGMLQuantizationType


@pytest.fixture
def small(tmp_path):
    return SmallFile(tmp_path)


def test_config_names_the_arguments_of_the_decoder(small):
    assert read_gguf(small()).config == {
        "vocabulary_size": 29,
        "num_layers": 2,
        "num_query_heads": 6,
        "num_key_value_heads": 3,
        "hidden_dim": 13,
        "intermediate_dim": 17,
        "head_dim": 10,
        "max_sequence_length": 41,
        "layer_norm_epsilon": 1e-5,
        "rope_max_wavelength": 500.0,
        "rope_position_scaling_factor": 1.0,
        "rope_frequency_factors": None,
        "rotary_dim": None,
        "use_bias": False,
        "tie_word_embeddings": True,
        "normalization": "rms_norm",
        "activation": "silu",
        "gated_feedforward": True,
        "position_embedding": "rotary",
    }


def test_rope_keys_reach_the_config(small):
    factors = np.array([1, 2, 4], "float32")
    changes = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.dimension_count": 6,
        "llama.attention.sliding_window": 7,
    }
    config = read_gguf(small(changes, {"rope_freqs.weight": factors})).config
    assert config["rope_position_scaling_factor"] == 4.0
    assert config["rope_frequency_factors"] == [1.0, 2.0, 4.0]
    assert config["rotary_dim"] == 6
    assert config["sliding_window"] == 7


def test_scaling_type_none_overrides_a_factor(small):
    changes = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert read_gguf(small(changes)).config["rope_position_scaling_factor"] == 1.0


def test_weights_have_keras_layouts(small):
    tensors = random_tensors(PRIMES)
    D, N, K, H = (PRIMES[letter] for letter in "DNKH")
    # As a model with half-split rotary pairs would have them, and then as the
    # converter of llama files permutes their rows.
    halves = {name: tensors[f"blk.1.attn_{name}.weight"] for name in "qk"}
    permuted = {
        f"blk.1.attn_{name}.weight": halves[name]
        .reshape(heads, 2, H // 2, D)
        .swapaxes(1, 2)
        .reshape(heads * H, D)
        for name, heads in (("q", N), ("k", K))
    }
    weights = read_gguf(small(tensor_changes=permuted)).weights
    expected = {
        "token_embedding/embeddings": tensors["token_embd.weight"],
        "final_norm/scale": tensors["output_norm.weight"],
        "block_1/attention_norm/scale": tensors["blk.1.attn_norm.weight"],
        "block_1/feedforward_norm/scale": tensors["blk.1.ffn_norm.weight"],
        "block_1/attention/query/kernel": halves["q"].T.reshape(D, N, H),
        "block_1/attention/key/kernel": halves["k"].T.reshape(D, K, H),
        "block_1/attention/value/kernel": tensors["blk.1.attn_v.weight"].T.reshape(
            D, K, H
        ),
        "block_1/attention/attention_output/kernel": tensors[
            "blk.1.attn_output.weight"
        ].T.reshape(N, H, D),
        "block_1/feedforward/gate/kernel": tensors["blk.1.ffn_gate.weight"].T,
        "block_1/feedforward/intermediate/kernel": tensors["blk.1.ffn_up.weight"].T,
        "block_1/feedforward/output/kernel": tensors["blk.1.ffn_down.weight"].T,
    }
    first_block = {
        name.replace("block_1", "block_0") for name in expected if "block" in name
    }
    assert set(weights) == set(expected) | first_block
    for name, value in expected.items():
        found = weights[name]()
        assert found.dtype == np.float32, name
        np.testing.assert_array_equal(found, value, err_msg=name)


def test_an_untied_head_is_transposed(small):
    head = np.random.default_rng(1).standard_normal((29, 13)).astype("float32")
    checkpoint = read_gguf(small(tensor_changes={"output.weight": head}))
    assert checkpoint.config["tie_word_embeddings"] is False
    found = checkpoint.weights["token_embedding/reverse_embeddings"]()
    np.testing.assert_array_equal(found, head.T)


def test_partial_rotary_keeps_the_scores(small):
    """Interleaved pairs on stored rows and half-split pairs on ours agree."""
    R, H, N, K, D = 6, 10, 6, 3, 13
    checkpoint = read_gguf(small({"llama.rope.dimension_count": R}))
    tensors = random_tensors(PRIMES)
    x, y = np.random.default_rng(2).standard_normal((2, D))
    angles = 3 * 500.0 ** (-np.arange(R // 2) * 2 / R)
    cos, sin = np.cos(angles), np.sin(angles)

    def rotate(vector, first, second):
        out = vector.copy()
        out[first] = vector[first] * cos - vector[second] * sin
        out[second] = vector[second] * cos + vector[first] * sin
        return out

    interleaved = (np.arange(0, R, 2), np.arange(1, R, 2))
    halves = (np.arange(R // 2), np.arange(R // 2, R))
    stored = {name: tensors[f"blk.0.attn_{name}.weight"] for name in "qk"}
    ours = {
        "q": checkpoint.weights["block_0/attention/query/kernel"](),
        "k": checkpoint.weights["block_0/attention/key/kernel"](),
    }
    for head in range(K):
        rows = slice(head * H, (head + 1) * H)
        theirs = rotate(stored["q"][rows] @ x, *interleaved) @ (stored["k"][rows] @ y)
        found = rotate(x @ ours["q"][:, head], *halves) @ (y @ ours["k"][:, head])
        np.testing.assert_allclose(found, theirs, rtol=1e-6)
    assert N * H == stored["q"].shape[0]


def reference_dequantize(raw, kind):
    """One block after the other, as the formats are specified."""
    if kind in (Q.F16, Q.F32):
        return raw.view("<f2" if kind == Q.F16 else "<f4").astype("float32")
    size = {Q.Q4_0: 18, Q.Q4_1: 20, Q.Q8_0: 34}[kind]
    rows = []
    for row in raw:
        values = []
        for start in range(0, row.size, size):
            block = row[start : start + size].tobytes()
            scale = np.float32(struct.unpack("<e", block[:2])[0])
            if kind == Q.Q8_0:
                codes = struct.unpack("32b", block[2:])
                values += [scale * np.float32(code) for code in codes]
                continue
            data = block[4:] if kind == Q.Q4_1 else block[2:]
            codes = [byte % 16 for byte in data] + [byte // 16 for byte in data]
            if kind == Q.Q4_1:
                least = np.float32(struct.unpack("<e", block[2:4])[0])
                values += [scale * np.float32(code) + least for code in codes]
            else:
                values += [scale * np.float32(code - 8) for code in codes]
        rows.append(values)
    return np.array(rows, "float32")


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.F16, Q.F32])
def test_quantized_tensors_match_numpy(tmp_path, kind):
    D, N, K, H = (BLOCKS[letter] for letter in "DNKH")
    raws = {
        name: (gguf.quants.quantize(value, kind), kind)
        for name, value in random_tensors(BLOCKS, tied=False).items()
        if value.ndim == 2
    }
    path = write(
        tmp_path / "blocks.gguf",
        metadata(**BLOCKS),
        random_tensors(BLOCKS, tied=False) | raws,
    )
    weights = read_gguf(path).weights
    plain = {name: reference_dequantize(*raw) for name, raw in raws.items()}
    halves = {
        name: plain[f"blk.0.attn_{name}.weight"]
        .reshape(heads, H // 2, 2, D)
        .swapaxes(1, 2)
        .reshape(heads * H, D)
        for name, heads in (("q", N), ("k", K))
    }
    for name, expected in {
        "token_embedding/embeddings": plain["token_embd.weight"],
        "token_embedding/reverse_embeddings": plain["output.weight"].T,
        "block_0/attention/query/kernel": halves["q"].T.reshape(D, N, H),
        "block_0/attention/key/kernel": halves["k"].T.reshape(D, K, H),
        "block_0/attention/attention_output/kernel": plain[
            "blk.0.attn_output.weight"
        ].T.reshape(N, H, D),
        "block_0/feedforward/output/kernel": plain["blk.0.ffn_down.weight"].T,
    }.items():
        found = weights[name]()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-7, err_msg=name)


def test_a_format_without_a_fast_path_is_read(tmp_path):
    """256 rows are widened at a time; this tensor has more, in Q5_1."""
    sizes = BLOCKS | {"F": 288}
    tensors = random_tensors(sizes)
    up = gguf.quants.quantize(tensors["blk.0.ffn_up.weight"], Q.Q5_1)
    path = write(
        tmp_path / "blocks.gguf",
        metadata(**sizes),
        tensors | {"blk.0.ffn_up.weight": (up, Q.Q5_1)},
    )
    found = read_gguf(path).weights["block_0/feedforward/intermediate/kernel"]()
    np.testing.assert_array_equal(found, gguf.quants.dequantize(up, Q.Q5_1).T)
    # And it is the tensor we began with, up to five bits.
    np.testing.assert_allclose(found, tensors["blk.0.ffn_up.weight"].T, atol=0.2)


def test_no_weight_is_read_before_it_is_asked_for(small):
    path = small()
    checkpoint = read_gguf(path)
    end = read_header(path).tensors["blk.1.ffn_down.weight"].offset
    with open(path, "r+b") as file:
        file.truncate(end + 4)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        checkpoint.weights["block_1/feedforward/output/kernel"]()
    checkpoint.weights["block_0/feedforward/output/kernel"]()


@pytest.mark.real_model
def test_smollm2(smollm2_path):
    checkpoint = read_gguf(smollm2_path)
    config = checkpoint.config
    assert config["num_layers"] == 30
    assert (config["num_query_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["rope_max_wavelength"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert len(checkpoint.weights) == 272
    # Recorded from transformers' LlamaForCausalLM of the same file, float32:
    # layers[29].self_attn.k_proj.weight.T[5, 64:68], mlp.down_proj.weight.T[3, :3].
    expected_key = [0.114959716796875, -0.053955078125, 0.114013671875, 0.0191650390625]
    expected_down = [0.04840087890625, 0.14422607421875, 0.030517578125]
    key = checkpoint.weights["block_29/attention/key/kernel"]()
    down = checkpoint.weights["block_29/feedforward/output/kernel"]()
    np.testing.assert_array_equal(key[5, 1, :4], expected_key)
    np.testing.assert_array_equal(down[3, :3], expected_down)
