"""The names that families give their tensors in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from keras_kvcache.loaders.hugging_face_weights import Layout, Source


def llama_layout(
    config: dict[str, Any],
    names: Collection[str],
    *,
    output_bias: bool = False,
    mlp_bias: bool = False,
    is_fused: bool = False,
) -> dict[str, Source]:
    """Maps the tensors of Llama and of all families that use its names.

    The rows of the query and key projections pair component `j` with
    `j + rotary_dim / 2` already, unlike those of a llama-architecture GGUF file.

    Args:
        config: The decoder's arguments.
        names: The tensors in the files.
        output_bias, mlp_bias: Whether the projection of the attention's output,
            and those of the feed-forward part, have biases. The decoder has both
            or none, so that one of them may be zero.
        is_fused: Whether queries, keys and values are one tensor, and gate and
            intermediate projection another, as in Phi-3.
    """
    layout = Layout(config, names, "model.")
    D, F = config["hidden_dim"], config["intermediate_dim"]
    N, K, H = (
        config[name] for name in ("num_query_heads", "num_key_value_heads", "head_dim")
    )
    bias = dict(has_bias=config["use_bias"], stores_bias=mlp_bias)
    layout.embedding("embed_tokens.weight")
    for i in range(config["num_layers"]):
        ours, theirs = f"block_{i}", f"layers.{i}"
        attention = f"{theirs}.self_attn"
        begin = 0
        for name, heads in (("query", N), ("key", K), ("value", K)):
            layout.dense(
                f"{ours}/attention/{name}",
                f"{attention}.{'qkv' if is_fused else name[0]}_proj",
                (D,),
                (heads, H),
                has_bias=config["attention_bias"],
                fused=(begin, (N + 2 * K) * H) if is_fused else None,
            )
            begin += heads * H
        layout.dense(
            f"{ours}/attention/attention_output",
            f"{attention}.o_proj",
            (N, H),
            (D,),
            has_bias=config["use_bias"],
            stores_bias=output_bias,
        )
        if config["query_key_norm"]:
            layout.norm(f"{ours}/query_norm", f"{attention}.q_norm", H)
            layout.norm(f"{ours}/key_norm", f"{attention}.k_norm", H)
        for name, tensor in _norms(config).items():
            layout.norm(f"{ours}/{name}", f"{theirs}.{tensor}")
        if config["num_experts"] is not None:
            _experts(layout, f"{ours}/feedforward", theirs)
            continue
        for index, (name, tensor) in enumerate(
            (("gate", "gate"), ("intermediate", "up"))
        ):
            layout.dense(
                f"{ours}/feedforward/{name}",
                f"{theirs}.mlp.{'gate_up' if is_fused else tensor}_proj",
                (D,),
                (F,),
                fused=(index * F, 2 * F) if is_fused else None,
                **bias,
            )
        layout.dense(
            f"{ours}/feedforward/output", f"{theirs}.mlp.down_proj", (F,), (D,), **bias
        )
    layout.norm("final_norm", "norm")
    return layout.sources


def _norms(config: dict[str, Any]) -> dict[str, str]:
    if not config["use_post_attention_norm"]:
        return {
            "attention_norm": "input_layernorm",
            "feedforward_norm": "post_attention_layernorm",
        }
    return {
        "attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "feedforward_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }


def _experts(layout: Layout, ours: str, theirs: str) -> None:
    """Maps a mixture of experts, stored one tensor an expert or all in one."""
    config = layout.config
    D, F, E = (
        config[name] for name in ("hidden_dim", "intermediate_dim", "num_experts")
    )
    kernels = {name: f"{ours}/experts/{name}_kernel" for name in _EXPERT_TENSORS}
    theirs_apart = f"{theirs}.block_sparse_moe"
    if layout.named(f"{theirs_apart}.gate.weight") in layout.names:
        layout.dense(f"{ours}/router", f"{theirs_apart}.gate", (D,), (E,))
        for name, tensor in _EXPERT_TENSORS.items():
            inputs, outputs = (F, D) if name == "output" else (D, F)
            layout.sources[kernels[name]] = Source(
                tuple(
                    layout.named(f"{theirs_apart}.experts.{e}.{tensor}.weight")
                    for e in range(E)
                ),
                (outputs, inputs),
                (E, inputs, outputs),
                transposed=True,
            )
        return
    layout.dense(f"{ours}/router", f"{theirs}.mlp.gate", (D,), (E,))
    for index, name in enumerate(("gate", "intermediate")):
        layout.add(
            kernels[name],
            f"{theirs}.mlp.experts.gate_up_proj",
            (E, 2 * F, D),
            (E, D, F),
            transposed=True,
            part=(1, index * F, (index + 1) * F),
        )
    layout.add(
        kernels["output"],
        f"{theirs}.mlp.experts.down_proj",
        (E, D, F),
        (E, F, D),
        transposed=True,
    )


_EXPERT_TENSORS = {"gate": "w1", "intermediate": "w3", "output": "w2"}


def gpt2_layout(config: dict[str, Any], names: Collection[str]) -> dict[str, Source]:
    """Maps GPT-2's tensors, whose kernels are stored as `(inputs, outputs)`."""
    layout = Layout(config, names, "transformer.")
    D, F = config["hidden_dim"], config["intermediate_dim"]
    heads = (config["num_query_heads"], config["head_dim"])
    how = dict(has_bias=True, inputs_first=True)
    layout.embedding("wte.weight")
    layout.add(
        "position_embedding/embeddings",
        "wpe.weight",
        (config["max_sequence_length"], D),
    )
    for i in range(config["num_layers"]):
        ours, theirs = f"block_{i}", f"h.{i}"
        layout.norm(f"{ours}/attention_norm", f"{theirs}.ln_1")
        for index, name in enumerate(("query", "key", "value")):
            layout.dense(
                f"{ours}/attention/{name}",
                f"{theirs}.attn.c_attn",
                (D,),
                heads,
                fused=(index * D, 3 * D),
                **how,
            )
        layout.dense(
            f"{ours}/attention/attention_output",
            f"{theirs}.attn.c_proj",
            heads,
            (D,),
            **how,
        )
        layout.norm(f"{ours}/feedforward_norm", f"{theirs}.ln_2")
        feedforward = f"{ours}/feedforward"
        layout.dense(
            f"{feedforward}/intermediate", f"{theirs}.mlp.c_fc", (D,), (F,), **how
        )
        layout.dense(f"{feedforward}/output", f"{theirs}.mlp.c_proj", (F,), (D,), **how)
    layout.norm("final_norm", "ln_f")
    return layout.sources


# Rows of OPT's table of positions that stand for no position.
OPT_POSITION_OFFSET = 2


def opt_layout(config: dict[str, Any], names: Collection[str]) -> dict[str, Source]:
    """Maps OPT's tensors."""
    layout = Layout(config, names, "model.")
    D, F = config["hidden_dim"], config["intermediate_dim"]
    heads = (config["num_query_heads"], config["head_dim"])
    rows = config["max_sequence_length"] + OPT_POSITION_OFFSET
    how = dict(has_bias=config["use_bias"])
    layout.embedding("decoder.embed_tokens.weight")
    layout.add(
        "position_embedding/embeddings",
        "decoder.embed_positions.weight",
        (rows, D),
        (rows - OPT_POSITION_OFFSET, D),
        part=(0, OPT_POSITION_OFFSET, rows),
    )
    for i in range(config["num_layers"]):
        ours, theirs = f"block_{i}", f"decoder.layers.{i}"
        attention = f"{theirs}.self_attn"
        layout.norm(f"{ours}/attention_norm", f"{attention}_layer_norm")
        for name in ("query", "key", "value"):
            layout.dense(
                f"{ours}/attention/{name}",
                f"{attention}.{name[0]}_proj",
                (D,),
                heads,
                **how,
            )
        layout.dense(
            f"{ours}/attention/attention_output",
            f"{attention}.out_proj",
            heads,
            (D,),
            **how,
        )
        layout.norm(f"{ours}/feedforward_norm", f"{theirs}.final_layer_norm")
        feedforward = f"{ours}/feedforward"
        layout.dense(f"{feedforward}/intermediate", f"{theirs}.fc1", (D,), (F,), **how)
        layout.dense(f"{feedforward}/output", f"{theirs}.fc2", (F,), (D,), **how)
    layout.norm("final_norm", "decoder.final_layer_norm")
    return layout.sources
