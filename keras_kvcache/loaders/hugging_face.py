"""Folders of Hugging Face models as checkpoints."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from keras_kvcache.errors import shortened
from keras_kvcache.loaders.checkpoint import Checkpoint
from keras_kvcache.loaders.hugging_face_config import read_config
from keras_kvcache.loaders.hugging_face_files import TensorFiles
from keras_kvcache.loaders.hugging_face_tokenizer import read_tokenizer
from keras_kvcache.loaders.hugging_face_weights import check_sources, read_source
from keras_kvcache.loaders.json_file import read_json


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
        config, layout = read_config(values)
        weights = {}
        if load_weights:
            files = TensorFiles(folder)
            # All layers' tensors are listed before any is looked up.
            if config["num_layers"] > len(files.shapes):
                raise ValueError(
                    "the number of layers must match the tensors. Received: "
                    f"{config['num_layers']} layers, {len(files.shapes)} tensors"
                )
            sources = layout(config, files.shapes)
            check_sources(files, sources)
            weights = {
                name: partial(read_source, files, source)
                for name, source in sources.items()
            }
        tokenizer = read_tokenizer(folder, values) if load_tokenizer else None
    except ValueError as error:
        raise ValueError(
            f"{folder} can't be loaded: {shortened(error, 500)}"
        ) from error
    return Checkpoint(config, weights, tokenizer)
