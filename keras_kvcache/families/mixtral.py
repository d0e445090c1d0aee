"""Mixtral, a Mistral with experts (Jiang et al., 2024, https://arxiv.org/abs/2401.04088)."""

from dataclasses import replace

from keras_kvcache.families import keras_hub_parts, llama_like
from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes

_APART, _JOINED = "block_sparse_moe.experts.{}", "mlp.experts"
_EXPERTS = {
    # One tensor an expert, or all in one.
    "router": ("block_sparse_moe.gate", "mlp.gate"),
    "experts/gate_kernel": (f"{_APART}.w1.weight", f"{_JOINED}.gate_up_proj"),
    "experts/intermediate_kernel": (f"{_APART}.w3.weight", f"{_JOINED}.gate_up_proj"),
    "experts/output_kernel": (f"{_APART}.w2.weight", f"{_JOINED}.down_proj"),
}
_PARTS = {
    **{part: name for part, name in llama_like.PARTS.items() if "mlp" not in name},
    **{f"feedforward/{part}": names for part, names in _EXPERTS.items()},
}


def _read(fields):
    config = llama_like.read_fields(
        fields,
        default_epsilon=1e-5,
        default_key_value_heads=8,
        default_theta=1_000_000.0,
    )
    config |= llama_like.one_window(fields, config["num_layers"])
    config["num_experts"] = fields.size("num_local_experts", 8)
    config["num_experts_per_token"] = fields.size("num_experts_per_tok", 2)
    return config, replace(llama_like.TENSORS, parts=_PARTS)


def _options(backbone):
    return dict(
        keras_hub_parts.windowed_options(backbone),
        num_experts=backbone.num_experts,
        num_experts_per_token=backbone.top_k,
    )


def _block_parts(block):
    mixture = block._sparse_moe_block
    return dict(
        attention_norm=block._self_attention_layernorm,
        attention=keras_hub_parts.projections(block._self_attention_layer),
        feedforward_norm=block._feedforward_layernorm,
        feedforward=dict(
            router=mixture._sparse_feedforward_gate_dense,
            experts=mixture.expert_bank,
        ),
    )


# The last two are of training.
_KNOWS = """
    num_experts top_k rope_max_wavelength rope_scaling_factor sliding_window
    router_jitter_noise router_aux_loss_coef
""".split()
FAMILY = Family(
    "Mixtral",
    hugging_face=(HuggingFace("mixtral", classes("Mixtral"), _read),),
    keras_hub=(KerasHub("MixtralBackbone", _options, _block_parts, knows=_KNOWS),),
)
