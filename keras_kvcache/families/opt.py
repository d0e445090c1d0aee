"""OPT (Zhang et al., 2022, https://arxiv.org/abs/2205.01068)."""

from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes
from keras_kvcache.families.fields import ACTIVATIONS
from keras_kvcache.families.gpt2_like import backbone_options, learned_positions
from keras_kvcache.families.keras_hub_parts import transformer_decoder
from keras_kvcache.families.tensors import TensorNames

TENSORS = TensorNames(
    prefix="model.",
    token_embedding="decoder.embed_tokens",
    position_table="decoder.embed_positions",
    position_offset=2,
    final_norm="decoder.final_layer_norm",
    block="decoder.layers.{}",
    parts={
        "attention_norm": "self_attn_layer_norm",
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/attention_output": "self_attn.out_proj",
        "feedforward_norm": "final_layer_norm",
        "feedforward/intermediate": "fc1",
        "feedforward/output": "fc2",
    },
)


def _read(fields):
    D = fields.size("hidden_size")
    fields.must_be("word_embed_proj_dim", D)
    fields.must_be("do_layer_norm_before", True)
    fields.must_be("_remove_final_layer_norm", False)
    fields.must_be("layer_norm_elementwise_affine", True)
    config = learned_positions(
        D,
        fields.size("num_attention_heads"),
        fields.size("ffn_dim"),
        vocabulary_size=fields.size("vocab_size"),
        num_layers=fields.size("num_hidden_layers"),
        max_sequence_length=fields.size("max_position_embeddings"),
        layer_norm_epsilon=1e-5,
        activation=fields.choice("activation_function", ACTIVATIONS, "relu"),
        use_bias=fields.flag("enable_bias", True),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )
    return config, TENSORS


_BACKBONE = KerasHub(
    "OPTBackbone",
    lambda backbone: backbone_options(backbone, "relu"),
    transformer_decoder,
    lambda backbone: dict(position_table=backbone.embeddings.position_embedding),
)
FAMILY = Family(
    "OPT",
    hugging_face=(HuggingFace("opt", classes("OPT"), _read),),
    keras_hub=(_BACKBONE,),
)
