"""The model is exactly a Llama or a GPT-2: keras-hub's, weight for weight."""

import numpy as np
import pytest
from conftest import make_lm
from keras import ops

hub = pytest.importorskip("keras_hub")

IDS = np.random.default_rng(2).integers(0, 101, (2, 17)).astype("int32")


def copy_layer(to, source):
    to.set_weights(source.get_weights())


def hub_logits(backbone):
    hidden = backbone({"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
    return ops.convert_to_numpy(backbone.token_embedding(hidden, reverse=True))


def test_equals_keras_hubs_llama():
    backbone = hub.models.LlamaBackbone(
        vocabulary_size=101,
        num_layers=3,
        num_query_heads=6,
        num_key_value_heads=2,
        hidden_dim=84,
        intermediate_dim=59,
        rope_max_wavelength=5003,
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=False,
    )
    lm = make_lm(
        "llama",
        hidden_dim=84,
        head_dim=14,
        rope_max_wavelength=5003,
        layer_norm_epsilon=1e-3,
    )
    lm.token_embedding.set_weights(backbone.token_embedding.get_weights())
    for block, theirs in zip(lm.blocks, backbone.transformer_layers, strict=True):
        attention = theirs._self_attention_layer
        copy_layer(block.attention_norm, theirs._self_attention_layernorm)
        copy_layer(block.attention.query_dense, attention._query_dense)
        copy_layer(block.attention.key_dense, attention._key_dense)
        copy_layer(block.attention.value_dense, attention._value_dense)
        copy_layer(block.attention.output_dense, attention._output_dense)
        copy_layer(block.feedforward_norm, theirs._feedforward_layernorm)
        copy_layer(block.feedforward.gate, theirs._feedforward_gate_dense)
        copy_layer(
            block.feedforward.intermediate, theirs._feedforward_intermediate_dense
        )
        copy_layer(block.feedforward.output_dense, theirs._feedforward_output_dense)
    copy_layer(lm.final_norm, backbone.layer_norm)
    ours = ops.convert_to_numpy(lm(IDS))
    np.testing.assert_allclose(ours, hub_logits(backbone), atol=2e-5, rtol=1e-4)


def test_equals_keras_hubs_gpt2():
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=101,
        num_layers=3,
        num_heads=6,
        hidden_dim=42,
        intermediate_dim=61,
        max_sequence_length=613,
    )
    lm = make_lm("gpt2")
    copy_layer(lm.token_embedding, backbone.token_embedding)
    copy_layer(lm.position_table, backbone.position_embedding)
    for block, theirs in zip(lm.blocks, backbone.transformer_layers, strict=True):
        copy_layer(block.attention_norm, theirs._self_attention_layer_norm)
        copy_layer(block.attention, theirs._self_attention_layer)
        copy_layer(block.feedforward_norm, theirs._feedforward_layer_norm)
        copy_layer(
            block.feedforward.intermediate, theirs._feedforward_intermediate_dense
        )
        copy_layer(block.feedforward.output_dense, theirs._feedforward_output_dense)
    copy_layer(lm.final_norm, backbone.layer_norm)
    rng = np.random.default_rng(4)
    for ours in lm.weights:
        # Their biases start at zero, which would hide a wrong one.
        if ours.path.endswith("bias"):
            ours.assign(rng.normal(size=ours.shape))
    for block, theirs in zip(lm.blocks, backbone.transformer_layers, strict=True):
        copy_layer(theirs._self_attention_layer, block.attention)
        copy_layer(
            theirs._feedforward_intermediate_dense, block.feedforward.intermediate
        )
        copy_layer(theirs._feedforward_output_dense, block.feedforward.output_dense)
    ours = ops.convert_to_numpy(lm(IDS))
    np.testing.assert_allclose(ours, hub_logits(backbone), atol=5e-5, rtol=1e-4)
