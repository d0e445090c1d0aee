"""Mixtral, a Mistral with experts (Jiang et al., 2024, https://arxiv.org/abs/2401.04088)."""

from dataclasses import replace

from keras_kvcache.families.family import Family, HuggingFace, KerasHub, classes
from keras_kvcache.families.keras_hub_parts import (
    attention_of,
    linear_rope,
    projections,
)
from keras_kvcache.families.llama_like import (
    TENSORS,
    one_window,
    read_fields,
    with_parts,
)
from keras_kvcache.families.rope_fields import rope_options

_APART = "block_sparse_moe.experts.{}."
_EXPERTS = {
    # One tensor an expert, or all in one.
    "feedforward/router": ("block_sparse_moe.gate", "mlp.gate"),
    "feedforward/experts/gate_kernel": (
        f"{_APART}w1.weight",
        "mlp.experts.gate_up_proj",
    ),
    "feedforward/experts/intermediate_kernel": (
        f"{_APART}w3.weight",
        "mlp.experts.gate_up_proj",
    ),
    "feedforward/experts/output_kernel": (
        f"{_APART}w2.weight",
        "mlp.experts.down_proj",
    ),
}
_DENSE = {part: name for part, name in TENSORS.parts.items() if "mlp" not in name}
_TENSORS = with_parts(replace(TENSORS, parts=_DENSE), _EXPERTS)


def _read(fields):
    config = read_fields(fields, default_epsilon=1e-5, default_groups=8)
    config |= rope_options(fields, config["head_dim"], 1_000_000.0)
    config |= one_window(fields, config["num_layers"])
    config["num_experts"] = fields.size("num_local_experts", 8)
    config["num_experts_per_token"] = fields.size("num_experts_per_tok", 2)
    return config, _TENSORS


def _options(backbone):
    attention = attention_of(backbone)
    return dict(
        linear_rope(attention.rotary_embedding_layer),
        head_dim=attention._head_dim,
        sliding_window=backbone.sliding_window,
        num_experts=backbone.num_experts,
        num_experts_per_token=backbone.top_k,
    )


def _parts(block):
    mixture = block._sparse_moe_block
    return dict(
        attention_norm=block._self_attention_layernorm,
        attention=projections(block._self_attention_layer),
        feedforward_norm=block._feedforward_layernorm,
        feedforward=dict(
            router=mixture._sparse_feedforward_gate_dense,
            experts=mixture.expert_bank,
        ),
    )


FAMILY = Family(
    "Mixtral",
    hugging_face=(HuggingFace("mixtral", classes("Mixtral"), _read),),
    keras_hub=(
        KerasHub(
            "MixtralBackbone",
            _options,
            _parts,
            knows=(
                "num_experts",
                "top_k",
                "rope_max_wavelength",
                "rope_scaling_factor",
                "sliding_window",
                # Of training.
                "router_jitter_noise",
                "router_aux_loss_coef",
            ),
        ),
    ),
)
