"""A `DecoderLM` as a model of keras-hub or of transformers, with the same weights."""

import functools

import keras_kvcache  # noqa: F401  # isort: skip  # First: it chooses JAX.
import keras
import numpy as np

from keras_kvcache.runtime.platform import is_accelerator

# What keras-hub calls the parts of a block that it names otherwise.
HUB_LLAMA_NAMES = {
    "attention_norm/": "self_attention_layernorm/",
    "attention/": "self_attention/",
    "feedforward_norm/": "feedforward_layernorm/",
    "feedforward/gate/": "feedforward_gate_dense/",
    "feedforward/intermediate/": "feedforward_intermediate_dense/",
    "feedforward/output/": "feedforward_output_dense/",
}
HUB_GPT2_NAMES = HUB_LLAMA_NAMES | {
    "attention_norm/": "self_attention_layer_norm/",
    "feedforward_norm/": "feedforward_layer_norm/",
}


def is_gpt2(lm):
    """Whether `lm` is a GPT-2; else it's a Llama."""
    return lm.position_embedding == "learned"


def hub_model(lm):
    """A `keras_hub.models.CausalLM` that shares the weights of `lm`."""
    from keras_hub import models

    sizes = dict(
        vocabulary_size=lm.vocabulary_size,
        num_layers=lm.num_layers,
        hidden_dim=lm.hidden_dim,
        intermediate_dim=lm.intermediate_dim,
        dtype=lm.dtype_policy,
    )
    if is_gpt2(lm):
        backbone = models.GPT2Backbone(
            **sizes,
            num_heads=lm.num_query_heads,
            max_sequence_length=lm.max_sequence_length,
        )
        share(lm.position_table.weights, backbone.position_embedding.weights)
        model = models.GPT2CausalLM(backbone, preprocessor=None)
        names = HUB_GPT2_NAMES
    else:
        backbone = models.LlamaBackbone(
            **sizes,
            num_query_heads=lm.num_query_heads,
            num_key_value_heads=lm.num_key_value_heads,
            rope_max_wavelength=lm.rope_max_wavelength,
            layer_norm_epsilon=lm.layer_norm_epsilon,
            tie_word_embeddings=lm.tie_word_embeddings,
        )
        model = models.LlamaCausalLM(backbone, preprocessor=None)
        names = HUB_LLAMA_NAMES
    share(lm.token_embedding.weights, backbone.token_embedding.weights)
    share(lm.final_norm.weights, backbone.layer_norm.weights)
    for block, layer in zip(lm.blocks, backbone.transformer_layers, strict=True):
        theirs = {weight.path: weight for weight in layer.weights}
        for weight in block.weights:
            name = weight.path.removeprefix(f"{lm.name}/{block.name}/")
            part = next(part for part in names if name.startswith(part))
            name = name.replace(part, names[part], 1)
            share([weight], [theirs[f"{layer.name}/{name}"]])
    model.compile(sampler="greedy")
    return model


def share(weights, others):
    """Lets other variables hold the same arrays, which nobody writes to."""
    for weight, other in zip(weights, others, strict=True):
        other.assign(weight.value)


@functools.lru_cache(maxsize=1)
def torch_model(lm, threads):
    """A model of transformers with a copy of the weights, which never stops early.

    It's on the GPU if JAX is on one.
    """
    import torch
    import transformers

    torch.set_num_threads(threads)
    device = torch.device("cuda" if is_accelerator() else "cpu")
    # It warns of every prompt that happens to hold the id used for padding.
    transformers.logging.set_verbosity_error()
    never = dict(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    if is_gpt2(lm):
        config = transformers.GPT2Config(
            vocab_size=lm.vocabulary_size,
            n_positions=lm.max_sequence_length,
            n_embd=lm.hidden_dim,
            n_layer=lm.num_layers,
            n_head=lm.num_query_heads,
            n_inner=lm.intermediate_dim,
            layer_norm_epsilon=lm.layer_norm_epsilon,
            **never,
        )
        make_model, state = transformers.GPT2LMHeadModel, gpt2_state(lm)
    else:
        config = transformers.LlamaConfig(
            vocab_size=lm.vocabulary_size,
            hidden_size=lm.hidden_dim,
            intermediate_size=lm.intermediate_dim,
            num_hidden_layers=lm.num_layers,
            num_attention_heads=lm.num_query_heads,
            num_key_value_heads=lm.num_key_value_heads,
            max_position_embeddings=lm.max_sequence_length,
            rms_norm_eps=lm.layer_norm_epsilon,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": lm.rope_max_wavelength,
            },
            tie_word_embeddings=lm.tie_word_embeddings,
            **never,
        )
        make_model, state = transformers.LlamaForCausalLM, llama_state(lm)
    with device:
        model = make_model(config).to(getattr(torch, lm.compute_dtype))
    # `torch.tensor` copies: JAX's memory is read-only.
    model.load_state_dict({name: torch.tensor(state[name]) for name in state})
    return model.eval()


def array(variable, *shape):
    """A Keras variable as a NumPy array of that shape, or of its own."""
    values = keras.ops.cast(variable.value, "float32")  # NumPy has no bfloat16
    return keras.ops.convert_to_numpy(values).reshape(shape or variable.shape)


def llama_state(lm):
    """Weights by the names that `transformers.LlamaForCausalLM` has for them."""
    width = lm.hidden_dim
    embedding = array(lm.token_embedding.embeddings)
    head = embedding
    if not lm.tie_word_embeddings:
        head = array(lm.token_embedding.reverse_embeddings).T
    state = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": array(lm.final_norm.scale),
    }
    for number, block in enumerate(lm.blocks):
        attention, forward = block.attention, block.feedforward
        weights = {
            "input_layernorm": array(block.attention_norm.scale),
            "self_attn.q_proj": array(attention.query_dense.kernel, width, -1).T,
            "self_attn.k_proj": array(attention.key_dense.kernel, width, -1).T,
            "self_attn.v_proj": array(attention.value_dense.kernel, width, -1).T,
            "self_attn.o_proj": array(attention.output_dense.kernel, -1, width).T,
            "post_attention_layernorm": array(block.feedforward_norm.scale),
            "mlp.gate_proj": array(forward.gate.kernel).T,
            "mlp.up_proj": array(forward.intermediate.kernel).T,
            "mlp.down_proj": array(forward.output_dense.kernel).T,
        }
        for name, value in weights.items():
            state[f"model.layers.{number}.{name}.weight"] = value
    return state


def gpt2_state(lm):
    """Weights by the names that `transformers.GPT2LMHeadModel` has for them."""
    width = lm.hidden_dim
    embedding = array(lm.token_embedding.embeddings)
    state = {
        "transformer.wte.weight": embedding,
        "transformer.wpe.weight": array(lm.position_table.embeddings),
        "transformer.ln_f.weight": array(lm.final_norm.gamma),
        "transformer.ln_f.bias": array(lm.final_norm.beta),
        "lm_head.weight": embedding,
    }
    for number, block in enumerate(lm.blocks):
        attention, forward = block.attention, block.feedforward
        inner = (attention.query_dense, attention.key_dense, attention.value_dense)
        weights = {
            "ln_1.weight": array(block.attention_norm.gamma),
            "ln_1.bias": array(block.attention_norm.beta),
            "attn.c_attn.weight": np.concatenate(
                [array(layer.kernel, width, -1) for layer in inner], axis=1
            ),
            "attn.c_attn.bias": np.concatenate(
                [array(layer.bias, -1) for layer in inner]
            ),
            "attn.c_proj.weight": array(attention.output_dense.kernel, -1, width),
            "attn.c_proj.bias": array(attention.output_dense.bias),
            "ln_2.weight": array(block.feedforward_norm.gamma),
            "ln_2.bias": array(block.feedforward_norm.beta),
            "mlp.c_fc.weight": array(forward.intermediate.kernel),
            "mlp.c_fc.bias": array(forward.intermediate.bias),
            "mlp.c_proj.weight": array(forward.output_dense.kernel),
            "mlp.c_proj.bias": array(forward.output_dense.bias),
        }
        for name, value in weights.items():
            state[f"transformer.h.{number}.{name}"] = value
    return state
