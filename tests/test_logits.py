"""Logits of hidden states, against what the embedding layer itself computes."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_kvcache.models.logits import vocabulary_logits

V, D = 101, 28


def make_embedding(**options):
    keras.utils.set_random_seed(3)
    embedding = keras.layers.ReversibleEmbedding(
        V, D, embeddings_initializer=keras.initializers.RandomNormal(), **options
    )
    embedding.build()
    return embedding


def hidden_states(embedding, *shape):
    x = np.random.default_rng(5).normal(size=(*shape, D))
    return ops.cast(x, embedding.compute_dtype)


def with_lora():
    embedding = make_embedding()
    embedding.enable_lora(3)
    embedding.lora_embeddings_b.assign(np.ones((3, D)))
    return embedding


def quantized(mode):
    embedding = make_embedding()
    embedding.quantize(mode)
    return embedding


@pytest.mark.parametrize("shape", [(3,), (3, 7)])
@pytest.mark.parametrize(
    "make",
    [
        make_embedding,
        lambda: make_embedding(tie_weights=False),
        lambda: make_embedding(logit_soft_cap=0.7),
        lambda: make_embedding(dtype="mixed_bfloat16"),
        lambda: make_embedding(dtype="mixed_bfloat16", reverse_dtype="float32"),
        with_lora,
        lambda: quantized("int8"),
        lambda: quantized("int4"),
    ],
    ids="tied untied soft_cap bfloat16 reverse_dtype lora int8 int4".split(),
)
def test_logits_are_those_of_the_layer(make, shape):
    embedding = make()
    x = hidden_states(embedding, *shape)
    expected = embedding(x, reverse=True)
    logits = vocabulary_logits(embedding, x)
    assert logits.dtype == expected.dtype
    assert tuple(logits.shape) == (*shape, V)
    logits, expected = (
        ops.convert_to_numpy(ops.cast(array, "float32")) for array in (logits, expected)
    )
    assert np.ptp(expected) > 0.1
    narrow = embedding.compute_dtype == "bfloat16"
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-2 if narrow else 1e-5)


@pytest.mark.jax_only
def test_the_table_is_not_transposed():
    import jax

    embedding = make_embedding()
    table = embedding.embeddings.value
    x = hidden_states(embedding, 1)

    def transposes(function):
        def program(table, x):
            mapping = [(embedding._embeddings, table)]
            with keras.StatelessScope(state_mapping=mapping):
                return function(x)

        return "transpose" in jax.jit(program).lower(table, x).as_text()

    assert transposes(lambda x: embedding(x, reverse=True))
    assert not transposes(lambda x: vocabulary_logits(embedding, x))
