"""GGUF files as checkpoints."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_kvcache.errors import quoted, shortened
from keras_kvcache.families import gguf_families
from keras_kvcache.families.gguf_keys import Keys, get_value
from keras_kvcache.families.tensors import Source, TensorNames, weight_sources
from keras_kvcache.loaders.checkpoint import Checkpoint
from keras_kvcache.loaders.dequantize import dequantize, dequantize_transposed
from keras_kvcache.loaders.gguf_header import TensorInfo, read_header
from keras_kvcache.loaders.gguf_tokenizer import build_tokenizer
from keras_kvcache.loaders.weights import check_tensors, read_weight

_ROPE_FACTORS = "rope_freqs.weight"


def read_gguf(path: str | os.PathLike) -> Checkpoint:
    """Reads a GGUF file of an architecture that a family knows.

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
        shapes = {name: info.shape for name, info in header.tensors.items()}
        config, names = _read_config(header.metadata, shapes)
        sources = weight_sources(config, names, shapes)
        others = {}
        if _ROPE_FACTORS in shapes:
            rotary_dim = config["rotary_dim"] or config["head_dim"]
            others[_ROPE_FACTORS] = (rotary_dim // 2,)
        check_tensors(shapes, sources, others)
        _check_quantizations(header.tensors)
        if others:
            info = header.tensors[_ROPE_FACTORS]
            factors = dequantize(_read_rows(path, info)[None], info.quantization)[0]
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
    read_tensor = partial(_read_tensor, path, header.tensors)
    weights = {
        name: partial(read_weight, source, read_tensor)
        for name, source in sources.items()
    }
    return Checkpoint(config, weights, tokenizer)


def _read_config(
    metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Any], TensorNames]:
    """The decoder's arguments and the names of the tensors, by the metadata."""
    architecture = get_value(metadata, "general.architecture", str)
    families = gguf_families()
    if architecture not in families:
        raise ValueError(
            f"'general.architecture' must be one of {tuple(families)}. Received: "
            f"{quoted(architecture)}"
        )
    parts = get_value(metadata, "split.count", int, 1)
    if parts > 1:
        raise ValueError(
            "the model must be in one file: 'split.count' must be at most 1. "
            f"Received: {parts}"
        )
    config, names = families[architecture].read(Keys(metadata, shapes, architecture))
    # The tensors of every layer are listed before any is looked up, so a bogus
    # count has to be caught here.
    if config["num_layers"] > len(shapes):
        raise ValueError(
            f"'{architecture}.block_count' must match the tensors. Received: "
            f"{config['num_layers']} in a file of {len(shapes)} tensors"
        )
    return config, names


def _half_split_order(heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """The stored row of each row of a query or key projection.

    The file keeps the two dimensions of a rotary pair side by side
    (2j, 2j + 1); the model pairs dimension j with j + rotary_dim / 2.
    Dimensions from `rotary_dim` on aren't rotated and stay where they are.
    """
    one_head = np.arange(head_dim)
    one_head[:rotary_dim] = one_head[:rotary_dim].reshape(-1, 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + one_head).reshape(-1)


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


def _read_tensor(
    path: Path, tensors: dict[str, TensorInfo], name: str, source: Source
) -> np.ndarray:
    """The part of a tensor that a weight is, float32, in the model's order."""
    rows, kind = _read_rows(path, tensors[name]), tensors[name].quantization
    axis, begin, end = source.part or (0, 0, None)
    part = (slice(None),) * axis + (slice(begin, end),)
    is_vector = rows.ndim == 1
    rows = dequantize(rows[None], kind)[0][part] if is_vector else rows[part]
    if source.interleaved is not None:
        rows = rows[_half_split_order(*source.interleaved)]
    if is_vector:
        return rows
    widen = dequantize_transposed if source.transposed else dequantize
    if rows.ndim == 2:
        return widen(rows, kind)
    return np.stack([widen(expert, kind) for expert in rows])


def _read_rows(path: Path, info: TensorInfo) -> np.ndarray:
    """A tensor as it is stored: uint8, its last axis the bytes of a row."""
    # Read, not mapped: a file cut short under a mapping would kill the process.
    data = np.fromfile(path, np.uint8, info.size, offset=info.offset)
    if data.size != info.size:
        raise ValueError(
            f"{path} has changed since it was opened: a tensor of {info.size} "
            f"bytes has only {data.size} left."
        )
    return data.reshape(*info.shape[:-1], -1)
