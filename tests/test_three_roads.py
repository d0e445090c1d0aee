"""One model by every road into the package: the same tokens come out."""

import json

import keras
import numpy as np
import pytest

from keras_kvcache import DecoderLM, from_keras_hub

hub = pytest.importorskip("keras_hub")

# Of our block's parts, what transformers calls them, with their kernels' axes merged.
TENSORS = {
    "attention_norm/scale": ("input_layernorm", None),
    "attention/query/kernel": ("self_attn.q_proj", 1),
    "attention/key/kernel": ("self_attn.k_proj", 1),
    "attention/value/kernel": ("self_attn.v_proj", 1),
    "attention/attention_output/kernel": ("self_attn.o_proj", 2),
    "feedforward_norm/scale": ("post_attention_layernorm", None),
    "feedforward/gate/kernel": ("mlp.gate_proj", 1),
    "feedforward/intermediate/kernel": ("mlp.up_proj", 1),
    "feedforward/output/kernel": ("mlp.down_proj", 1),
}

# What keras-hub calls parts, and what they are here.
HUB_NAMES = {
    "transformer_layer_": "block_",
    "self_attention_layernorm": "attention_norm",
    "self_attention/": "attention/",
    "feedforward_layernorm": "feedforward_norm",
    "feedforward_gate_dense": "feedforward/gate",
    "feedforward_intermediate_dense": "feedforward/intermediate",
    "feedforward_output_dense": "feedforward/output",
    "sequence_output_layernorm": "final_norm",
}


def weights_by_path(lm):
    """Arrays by their paths in the model."""
    return {
        weight.path.split("/", 1)[1]: keras.ops.convert_to_numpy(weight)
        for weight in lm.weights
    }


def write_hugging_face(lm, folder):
    """A Llama's weights, config and tokenizer as transformers would write them."""
    from safetensors.numpy import save_file

    arrays = weights_by_path(lm)
    tensors = {
        "model.embed_tokens.weight": arrays["token_embedding/embeddings"],
        "model.norm.weight": arrays["final_norm/scale"],
    }
    for i in range(lm.num_layers):
        for ours, (theirs, inputs) in TENSORS.items():
            array = arrays[f"block_{i}/{ours}"]
            if inputs is not None:
                rows = int(np.prod(array.shape[:inputs]))
                array = np.ascontiguousarray(array.reshape(rows, -1).T)
            tensors[f"model.layers.{i}.{theirs}.weight"] = array
    save_file(tensors, folder / "model.safetensors")
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=lm.vocabulary_size,
        hidden_size=lm.hidden_dim,
        intermediate_size=lm.intermediate_dim,
        num_hidden_layers=lm.num_layers,
        num_attention_heads=lm.num_query_heads,
        num_key_value_heads=lm.num_key_value_heads,
        max_position_embeddings=lm.max_sequence_length,
        rms_norm_eps=lm.layer_norm_epsilon,
        rope_theta=lm.rope_max_wavelength,
        tie_word_embeddings=True,
    )
    (folder / "config.json").write_text(json.dumps(config))
    lm.tokenizer.save(folder)
    names = dict(
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=lm.tokenizer.chat_template,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def through_keras_hub(lm):
    """The weights moved into keras-hub's Llama, and that shared with ours."""
    backbone = hub.models.LlamaBackbone(
        vocabulary_size=lm.vocabulary_size,
        num_layers=lm.num_layers,
        num_query_heads=lm.num_query_heads,
        num_key_value_heads=lm.num_key_value_heads,
        hidden_dim=lm.hidden_dim,
        intermediate_dim=lm.intermediate_dim,
        rope_max_wavelength=lm.rope_max_wavelength,
        layer_norm_epsilon=lm.layer_norm_epsilon,
        tie_word_embeddings=True,
    )
    arrays = weights_by_path(lm)
    for weight in backbone.weights:
        path = weight.path
        for theirs, ours in HUB_NAMES.items():
            path = path.replace(theirs, ours)
        array = arrays.pop(path)
        weight.assign(array.reshape(weight.shape))
    assert not arrays
    return from_keras_hub(hub.models.LlamaCausalLM(backbone, preprocessor=None))


@pytest.mark.slow
@pytest.mark.real_model
def test_three_roads_to_smollm2(smollm2, tmp_path):
    write_hugging_face(smollm2, tmp_path)
    lm = DecoderLM.from_preset(tmp_path)
    text = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me three things about the sea."}]
    )
    assert lm.tokenizer.chat_template == smollm2.tokenizer.chat_template
    assert lm.tokenizer.stop_token_ids == (2,)
    prompt = smollm2.tokenizer.encode(text)
    assert lm.tokenizer.encode(text) == prompt
    answer = smollm2.generate(prompt, max_new_tokens=40)
    assert len(answer) == len(prompt) + 40
    assert lm.generate(prompt, max_new_tokens=40) == answer
    del lm
    assert through_keras_hub(smollm2).generate(prompt, max_new_tokens=40) == answer
