"""GPT-2 (Radford et al., 2019)."""

from keras_kvcache.families.family import Family, HuggingFace, KerasHub
from keras_kvcache.families.fields import ACTIVATIONS
from keras_kvcache.families.gpt2_like import backbone_options, learned_positions
from keras_kvcache.families.keras_hub_parts import transformer_decoder
from keras_kvcache.families.tensors import TensorNames

TENSORS = TensorNames(
    prefix="transformer.",
    token_embedding="wte",
    position_table="wpe",
    final_norm="ln_f",
    block="h.{}",
    parts={
        "attention_norm": "ln_1",
        "attention/query": "attn.c_attn",
        "attention/key": "attn.c_attn",
        "attention/value": "attn.c_attn",
        "attention/attention_output": "attn.c_proj",
        "feedforward_norm": "ln_2",
        "feedforward/intermediate": "mlp.c_fc",
        "feedforward/output": "mlp.c_proj",
    },
    inputs_first=True,
    # The causal mask and what it masks with, in older files.
    ignored=r"(.*\.)?attn\.(bias|masked_bias)",
)


def _read(fields):
    fields.must_be("scale_attn_by_inverse_layer_idx", False)
    D = fields.size("n_embd")
    config = learned_positions(
        D,
        fields.size("n_head"),
        fields.size("n_inner", 4 * D),
        vocabulary_size=fields.size("vocab_size"),
        num_layers=fields.size("n_layer"),
        max_sequence_length=fields.size("n_positions"),
        layer_norm_epsilon=fields.real("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        use_bias=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
    )
    if not fields.flag("scale_attn_weights", True):
        config["query_scale"] = 1.0
    return config, TENSORS


_BACKBONE = KerasHub(
    "GPT2Backbone",
    lambda backbone: backbone_options(backbone, "gelu_tanh"),
    transformer_decoder,
    lambda backbone: dict(position_table=backbone.position_embedding),
)
FAMILY = Family(
    "GPT-2",
    hugging_face=(HuggingFace("gpt2", ("GPT2LMHeadModel", "GPT2Model"), _read),),
    keras_hub=(_BACKBONE,),
)
