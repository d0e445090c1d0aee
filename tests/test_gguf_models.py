"""Models from GGUF files, against the tensors that were written."""

import keras
import numpy as np
import pytest
from gguf_files import PRIMES, metadata, random_tensors, write
from keras import ops

from keras_kvcache import DecoderLM


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_file_make_the_model(tmp_path, tied):
    tensors = random_tensors(PRIMES, tied=tied)
    path = write(tmp_path / "model.gguf", metadata(**PRIMES), tensors)
    lm = DecoderLM.from_preset(str(path))
    assert (lm.hidden_dim, lm.num_query_heads, lm.head_dim) == (13, 6, 10)
    assert lm.max_sequence_length == 41
    ids = np.array([[3, 1, 4, 1, 5]])
    embedded = ops.convert_to_numpy(lm.token_embedding(ids))
    np.testing.assert_array_equal(embedded[0], tensors["token_embd.weight"][ids[0]])
    hidden = np.ones((1, 13), "float32")
    head = tensors["token_embd.weight" if tied else "output.weight"]
    logits = ops.convert_to_numpy(lm.logits(hidden))
    np.testing.assert_allclose(logits[0], head.sum(axis=1), atol=1e-5)
    text = lm.generate("ab", max_new_tokens=5, stop_token_ids=None)
    assert text.startswith("ab")


def test_rotation_of_interleaved_pairs_is_carried_over(tmp_path):
    """Scores of a file's own rule, pairs (2j, 2j + 1), and of the loaded model."""
    tensors = random_tensors(PRIMES, seed=3)
    path = write(tmp_path / "model.gguf", metadata(**PRIMES), tensors)
    lm = DecoderLM.from_preset(path)
    x = np.random.default_rng(1).normal(size=(1, 7, 13)).astype("float32")
    attention = lm.blocks[0].attention

    def interleaved(name, heads):
        y = (x[0] @ tensors[f"blk.0.attn_{name}.weight"].T).reshape(7, heads, 5, 2)
        angle = np.arange(7)[:, None] * 500.0 ** (-np.arange(5) / 5)
        turn = np.exp(1j * angle)[:, None]
        return (y[..., 0] + 1j * y[..., 1]) * turn

    queries, keys = interleaved("q", 6), np.repeat(interleaved("k", 3), 2, axis=1)
    scores = np.einsum("tnj,snj->nts", queries, keys.conj()).real / np.sqrt(10)
    scores = np.where(np.tri(7, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    _, ours = attention(x, x, use_causal_mask=True, return_attention_scores=True)
    np.testing.assert_allclose(ops.convert_to_numpy(ours)[0], weights, atol=1e-5)


def test_nothing_is_made_of_a_bad_file(tmp_path):
    path = write(tmp_path / "model.gguf", metadata(**PRIMES), random_tensors(PRIMES))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.gguf"):
        DecoderLM.from_preset(path)
    write(path, {}, {}, architecture="mamba")
    with pytest.raises(ValueError, match="mamba"):
        DecoderLM.from_preset(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="model.gguf"):
        DecoderLM.from_preset(path)


@pytest.mark.jax_only
def test_dtype_suits_the_platform_unless_told_otherwise(tmp_path, monkeypatch):
    import jax

    path = write(tmp_path / "model.gguf", metadata(**PRIMES), random_tensors(PRIMES))
    assert DecoderLM.from_preset(path).compute_dtype == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert DecoderLM.from_preset(path).compute_dtype == "bfloat16"
    assert DecoderLM.from_preset(path, dtype="float32").compute_dtype == "float32"
    monkeypatch.setattr(
        keras.config, "dtype_policy", lambda: keras.DTypePolicy("float16")
    )
    assert DecoderLM.from_preset(path).compute_dtype == "float16"
