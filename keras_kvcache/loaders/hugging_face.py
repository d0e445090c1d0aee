"""Folders of Hugging Face models as checkpoints."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_kvcache.errors import quoted, shortened
from keras_kvcache.families import hugging_face_families
from keras_kvcache.families.fields import Fields
from keras_kvcache.families.tensors import Source, TensorNames, weight_sources
from keras_kvcache.loaders.checkpoint import Checkpoint
from keras_kvcache.loaders.hugging_face_files import TensorFiles
from keras_kvcache.loaders.hugging_face_tokenizer import read_tokenizer
from keras_kvcache.loaders.json_file import read_json
from keras_kvcache.loaders.weights import check_tensors, read_weight


def read_hugging_face(
    folder: str | os.PathLike,
    load_weights: bool = True,
    load_tokenizer: bool = True,
) -> Checkpoint:
    """Reads a folder that `save_pretrained` of transformers wrote.

    It has a `config.json`, weights as safetensors, and perhaps a tokenizer. All is
    checked, every tensor's presence and shape included, before anything is yielded.
    Weights are read one at a time, when asked for. No code is run and no pickle read.

    Args:
        folder: Its path.
        load_weights: Whether weights are wanted; if not, their files needn't be
            there.
        load_tokenizer: Whether the tokenizer is wanted.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the model is one that the decoder
            can't run as transformers does. The message names the folder, the rule
            and what was found.
    """
    folder = Path(folder)
    try:
        values = read_json(folder / "config.json")
        config, names = _read_config(values)
        weights = {}
        if load_weights:
            files = TensorFiles(folder)
            # All layers' tensors are listed before any is looked up.
            if config["num_layers"] > len(files.shapes):
                raise ValueError(
                    "the number of layers must match the tensors. Received: "
                    f"{config['num_layers']} layers, {len(files.shapes)} tensors"
                )
            sources = weight_sources(config, names, files.shapes)
            check_tensors(files.shapes, sources, ignored=names.ignored)
            weights = {
                name: partial(read_weight, source, partial(_read_tensor, files))
                for name, source in sources.items()
            }
        tokenizer = read_tokenizer(folder, values) if load_tokenizer else None
    except ValueError as error:
        raise ValueError(
            f"{folder} can't be loaded: {shortened(error, 500)}"
        ) from error
    return Checkpoint(config, weights, tokenizer)


def _read_config(values: dict[str, Any]) -> tuple[dict[str, Any], TensorNames]:
    """The decoder's arguments and the names of the tensors, by `config.json`."""
    fields, families = Fields(values), hugging_face_families()
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in families:
        raise ValueError(
            f"`model_type` must be one of {', '.join(families)}. Received: "
            f"{quoted(model_type)}"
        )
    family = families[model_type]
    fields.must_be("architectures", *([name] for name in family.architectures), [])
    # Variants that other code than the family's own would have to run.
    fields.must_be("quantization_config")
    fields.must_be("is_encoder_decoder", False)
    fields.must_be("add_cross_attention", False)
    fields.must_be("rope_interleaved", False)
    fields.must_be("use_bidirectional_attention", False)
    fields.must_be("is_causal", True)
    return family.read(fields)


def _read_tensor(files: TensorFiles, name: str, source: Source) -> np.ndarray:
    """The part of a tensor that a weight is, or a part of a weight."""
    array = files.read(name, source.part)
    if source.twin in files.shapes and not np.array_equal(
        array, files.read(source.twin)
    ):
        raise ValueError(
            "`tie_word_embeddings` must be false for a model whose "
            f"{quoted(source.twin)} differs from {quoted(name)}. Received: true"
        )
    return array.swapaxes(-1, -2) if source.transposed else array
