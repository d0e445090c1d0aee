"""GGUF files of the llama architecture as checkpoints."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_kvcache.errors import quoted, shortened
from keras_kvcache.loaders.checkpoint import Checkpoint
from keras_kvcache.loaders.dequantize import dequantize, dequantize_transposed
from keras_kvcache.loaders.gguf_config import read_config
from keras_kvcache.loaders.gguf_header import Header, TensorInfo, read_header
from keras_kvcache.loaders.gguf_tokenizer import build_tokenizer

_ROPE_FACTORS = "rope_freqs.weight"


def read_gguf(path: str | os.PathLike) -> Checkpoint:
    """Reads a GGUF file of the llama architecture.

    The file is checked whole, every tensor's presence, shape and place
    included, before anything is yielded. Weights are read and dequantized one
    at a time, when asked for.

    Args:
        path: Of the file.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds a model that the decoder
            can't run. The message names the path, the rule and what was found.
    """
    path = Path(path)
    header = read_header(path)
    try:
        config = read_config(header)
        sources = _weight_sources(config)
        _check_tensors(header, config, sources)
        if _ROPE_FACTORS in header.tensors:
            info = header.tensors[_ROPE_FACTORS]
            factors = dequantize(_read_rows(path, info), info.quantization)[0]
            if not (factors > 0).all():
                raise ValueError(
                    f"tensor {quoted(_ROPE_FACTORS)} must hold positive numbers, which "
                    f"frequencies are divided by. Received: {factors.min()}"
                )
            config["rope_frequency_factors"] = factors.tolist()
        tokenizer = build_tokenizer(header.metadata, config["vocabulary_size"])
        if tokenizer.vocabulary_size > config["vocabulary_size"]:
            raise ValueError(
                "the embedding must have a row for every token. Received: "
                f"{config['vocabulary_size']} rows for "
                f"{tokenizer.vocabulary_size} tokens"
            )
    except ValueError as error:
        raise ValueError(f"{path} can't be loaded: {shortened(error, 500)}") from error
    weights = {
        name: partial(_read_weight, path, header.tensors[source.tensor], source)
        for name, source in sources.items()
    }
    return Checkpoint(config, weights, tokenizer)


@dataclass(frozen=True)
class _Source:
    """The tensor that one weight of the model is read from, and how.

    Attributes:
        tensor: Its name in the file.
        stored: The shape it must have there.
        shape: The shape the model wants, after the transposition if any.
        transposed: Whether the file stores `(outputs, inputs)`.
        rotated: For a query or key projection its heads, head size and how many
            dimensions of a head are rotated; else None.
    """

    tensor: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    rotated: tuple[int, int, int] | None = None


def _weight_sources(config: dict[str, Any]) -> dict[str, _Source]:
    """Maps the model's weight names to the file's tensors."""
    V, D = config["vocabulary_size"], config["hidden_dim"]
    N, K = config["num_query_heads"], config["num_key_value_heads"]
    H, F = config["head_dim"], config["intermediate_dim"]
    rotary_dim = config["rotary_dim"] or H

    def kernel(tensor, inputs, outputs, rotated=None):
        stored = (math.prod(outputs), math.prod(inputs))
        return _Source(tensor, stored, inputs + outputs, True, rotated)

    def scale(tensor):
        return _Source(tensor, (D,), (D,))

    sources = {
        "token_embedding/embeddings": _Source("token_embd.weight", (V, D), (V, D))
    }
    if not config["tie_word_embeddings"]:
        sources["token_embedding/reverse_embeddings"] = kernel(
            "output.weight", (D,), (V,)
        )
    for i in range(config["num_layers"]):
        block = {
            "attention_norm/scale": scale("attn_norm"),
            "attention/query/kernel": kernel(
                "attn_q", (D,), (N, H), (N, H, rotary_dim)
            ),
            "attention/key/kernel": kernel("attn_k", (D,), (K, H), (K, H, rotary_dim)),
            "attention/value/kernel": kernel("attn_v", (D,), (K, H)),
            "attention/attention_output/kernel": kernel("attn_output", (N, H), (D,)),
            "feedforward_norm/scale": scale("ffn_norm"),
            "feedforward/gate/kernel": kernel("ffn_gate", (D,), (F,)),
            "feedforward/intermediate/kernel": kernel("ffn_up", (D,), (F,)),
            "feedforward/output/kernel": kernel("ffn_down", (F,), (D,)),
        }
        for name, source in block.items():
            sources[f"block_{i}/{name}"] = replace(
                source, tensor=f"blk.{i}.{source.tensor}.weight"
            )
    sources["final_norm/scale"] = scale("output_norm.weight")
    return sources


def _half_split_order(heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """The stored row of each row of a query or key projection.

    A llama file keeps the two dimensions of a rotary pair side by side
    (2j, 2j + 1); the model pairs dimension j with j + rotary_dim / 2.
    Dimensions from `rotary_dim` on aren't rotated and stay where they are.
    """
    one_head = np.arange(head_dim)
    one_head[:rotary_dim] = one_head[:rotary_dim].reshape(-1, 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + one_head).reshape(-1)


def _check_tensors(
    header: Header, config: dict[str, Any], sources: dict[str, _Source]
) -> None:
    """Raises unless the file's tensors are exactly those the model has."""
    wanted = {source.tensor: source.stored for source in sources.values()}
    if _ROPE_FACTORS in header.tensors:
        rotary_dim = config["rotary_dim"] or config["head_dim"]
        wanted[_ROPE_FACTORS] = (rotary_dim // 2,)
    _refuse("it must hold these tensors, but doesn't", wanted, header.tensors)
    # A tensor left over (a bias, a query norm, an expert) would change the
    # model's answers, so it is never skipped in silence.
    _refuse("it holds tensors the decoder has no place for", header.tensors, wanted)
    for name, shape in wanted.items():
        info = header.tensors[name]
        if info.shape != shape:
            raise ValueError(
                f"tensor {quoted(name)} must have shape {shape}. Received: {info.shape}"
            )
    _check_quantizations(header.tensors)


def _refuse(reason: str, names: dict, known: dict) -> None:
    found = [name for name in names if name not in known]
    if found:
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise ValueError(f"{reason}: {', '.join(found[:6])}{more}.")


def _check_quantizations(tensors: dict[str, TensorInfo]) -> None:
    from gguf import GGML_QUANT_SIZES

    first_of_kind = {info.quantization: name for name, info in tensors.items()}
    for kind, name in first_of_kind.items():
        # One block of zeros shows whether the library can read the format.
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {quoted(name)} is stored as {kind.name}, which can't be "
                "dequantized."
            ) from error


def _read_weight(path: Path, info: TensorInfo, source: _Source) -> np.ndarray:
    """One weight, float32, in the model's layout."""
    rows = _read_rows(path, info)
    if source.rotated:
        rows = rows[_half_split_order(*source.rotated)]
    widen = dequantize_transposed if source.transposed else dequantize
    return widen(rows, info.quantization).reshape(source.shape)


def _read_rows(path: Path, info: TensorInfo) -> np.ndarray:
    """A tensor as it is stored: uint8 `(rows, bytes per row)`."""
    # Read, not mapped: a file cut short under a mapping would kill the process.
    data = np.fromfile(path, np.uint8, info.size, offset=info.offset)
    if data.size != info.size:
        raise ValueError(
            f"{path} has changed since it was opened: a tensor of {info.size} "
            f"bytes has only {data.size} left."
        )
    return data.reshape(info.shape[0] if len(info.shape) > 1 else 1, -1)
