"""Reads and checks the inputs that an encoder-decoder model generates from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from keras import ops

from keras_kvcache.generation.prompts import Prompts, read_prompts

ENCODER_IDS, PADDING_MASK = "encoder_token_ids", "encoder_padding_mask"
DECODER_IDS, DECODER_MASK = "decoder_token_ids", "decoder_padding_mask"
# Inputs of an encoder are cut to 32, 64, 128, … positions, as each width is a program.
SMALLEST_WIDTH = 32


def read_pairs(inputs: Any, model: Any) -> tuple[dict[str, np.ndarray], Prompts]:
    """Brings any form of `inputs` to arrays for the encoder and the decoder's prompts.

    Args:
        inputs: As in `EncoderDecoderLM.generate`.
        model: The `EncoderDecoderLM`.

    Returns:
        The pair of a dictionary of NumPy arrays and of `Prompts`, with as many rows.

    Raises:
        TypeError: `inputs` is of the wrong kind.
        ValueError: Something is missing or doesn't fit.
    """
    texts, single = _texts_of(inputs)
    if texts is not None:
        inputs = _tokenize(*texts, model.tokenizer)
    if not isinstance(inputs, dict):
        raise TypeError(
            "`inputs` must be a string, a list of strings or a dictionary. Received: "
            f"{type(inputs).__name__}"
        )
    arrays = read_encoder_inputs(inputs, model)
    prompts = _read_decoder(inputs, model)
    rows = next(iter(arrays.values())).shape[0]
    if rows != len(prompts.rows):
        raise ValueError(
            "`inputs` must have as many rows for the decoder as for the encoder. "
            f"Received: {len(prompts.rows)} and {rows}"
        )
    if texts is not None:
        prompts = replace(prompts, form="text", single=single, texts=tuple(texts[1]))
    return arrays, prompts


def read_encoder_inputs(inputs: Any, model: Any) -> dict[str, np.ndarray]:
    """The encoder's part of a dictionary, without padding that all rows have.

    Args:
        inputs: Dictionary of the inputs that the encoder has names for, each
            `(B, E, …)`; of these a padding mask may be left out. Others are ignored.
        model: The `EncoderDecoderLM`.

    Returns:
        A dictionary of NumPy arrays.

    Raises:
        TypeError: Token ids aren't integers.
        ValueError: One is missing, two don't fit together, there are more positions
            than the encoder knows, or ids that aren't in its vocabulary.
    """
    names = model.encoder_inputs
    check_encoder_names(inputs, [name for name in names if name != PADDING_MASK])
    arrays = {n: ops.convert_to_numpy(inputs[n]) for n in names if n in inputs}
    if PADDING_MASK in names:
        arrays.setdefault(PADDING_MASK, np.ones(next(iter(arrays.values())).shape[:2]))
        arrays[PADDING_MASK] = arrays[PADDING_MASK].astype(bool)
    shapes = {name: array.shape for name, array in arrays.items()}
    sizes = {shape[:2] for shape in shapes.values()}
    if len(sizes) > 1 or min(map(len, sizes)) < 2 or 0 in next(iter(sizes)):
        raise ValueError(
            "`inputs` must have at least one row and one position, as many for all "
            f"inputs of the encoder. Received: {shapes}"
        )
    if PADDING_MASK in names:
        arrays = _trim(arrays)
    length = next(iter(arrays.values())).shape[1]
    if model.max_encoder_length is not None and length > model.max_encoder_length:
        raise ValueError(
            f"`inputs` must have at most the {model.max_encoder_length} positions that "
            f"the encoder knows. Received: {shapes}"
        )
    if ENCODER_IDS in names and model.encoder_vocabulary_size is not None:
        read_prompts(arrays[ENCODER_IDS], None, model.encoder_vocabulary_size)
    return arrays


def check_encoder_names(inputs: Any, names: Sequence[str]) -> None:
    """Refuses inputs that lack one of the encoder's.

    Args:
        inputs: As in `read_encoder_inputs`.
        names: What is needed, by the encoder's names.

    Raises:
        ValueError: One is missing.
    """
    if not set(names) <= set(inputs):
        raise ValueError(
            f"`inputs` must have the keys {names} of the encoder. Received: "
            f"{sorted(inputs)}"
        )


def _trim(arrays):
    """Leaves out the last positions, as far as no row shows them."""
    mask = arrays[PADDING_MASK]
    if not mask.any(axis=1).all():
        raise ValueError(
            f"`inputs` must show at least one position of each row in '{PADDING_MASK}'."
            f" Received: rows {np.flatnonzero(~mask.any(axis=1)).tolist()} of zeros"
        )
    needed = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
    width = max(SMALLEST_WIDTH, 1 << (needed - 1).bit_length())
    return {name: array[:, :width] for name, array in arrays.items()}


def _read_decoder(inputs, model):
    if DECODER_IDS not in inputs:
        raise ValueError(
            f"`inputs` must have '{DECODER_IDS}', what the answers begin with. "
            f"Received: {sorted(inputs)}"
        )
    ids = inputs[DECODER_IDS]
    if DECODER_MASK in inputs:
        ids = {"token_ids": ids, "padding_mask": inputs[DECODER_MASK]}
    return read_prompts(ids, model.tokenizer, model.vocabulary_size)


def _texts_of(inputs):
    """The texts for encoder and decoder, two lists, and whether there is but one.

    In the place of the lists stands `None` if `inputs` aren't texts.
    """
    encoded, decoded = inputs, None
    if isinstance(inputs, dict):
        encoded, decoded = inputs.get("encoder_text"), inputs.get("decoder_text")
    if not isinstance(encoded, (str, list, tuple)):
        return None, False
    single = isinstance(encoded, str)
    encoded = [encoded] if single else list(encoded)
    if decoded is None:
        decoded = [""] * len(encoded)
    decoded = [decoded] if isinstance(decoded, str) else list(decoded)
    is_text = all(isinstance(text, str) for text in (*encoded, *decoded))
    if not is_text or not encoded or len(encoded) != len(decoded):
        raise ValueError(
            "`inputs` must be texts, at least one, and as many for the decoder as for "
            f"the encoder if it has any. Received: {encoded!r} and {decoded!r}"
        )
    return (encoded, decoded), single


def _tokenize(encoded, decoded, tokenizer):
    if tokenizer is None:
        raise ValueError(
            "`inputs` may be text only if there is a tokenizer; give token ids. "
            f"Received: {encoded[0]!r}"
        )
    return tokenizer.encode_pairs(encoded, decoded)
