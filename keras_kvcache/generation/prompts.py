"""The inputs of `generate`: texts, messages, token ids, keras-hub's dictionaries."""

import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from keras import ops

from keras_kvcache.errors import quoted
from keras_kvcache.generation.buckets import chunk_sizes


@dataclass(frozen=True)
class Prompts:
    """Prompts as rows of token ids, and what form the answer takes.

    Attributes:
        rows: Tuple of int32 arrays, one a prompt.
        form: `"text"`, `"ids"` or `"arrays"` (keras-hub's dictionary).
        single: Whether the user gave one prompt instead of a list.
        texts: The prompts as the user wrote them, for `"text"`.
        width: Columns of the user's arrays, for `"arrays"`.
        answer_only: Whether answers come without the prompts, which aren't the
            user's own text where a chat template wrote them.
    """

    rows: tuple[np.ndarray, ...]
    form: str
    single: bool
    texts: tuple[str, ...] = ()
    width: int | None = None
    answer_only: bool = False


def read_prompts(inputs: Any, tokenizer: Any, vocabulary_size: int | None) -> Prompts:
    """Brings any form of `inputs` to rows of token ids.

    Args:
        inputs: A string, a list of strings, a list of messages, a list of such
            lists, a list of ids, a list of lists of ids (or arrays), or a dictionary
            of `"token_ids"` and `"padding_mask"`, arrays `(B, T)` padded on the
            right.
        tokenizer: Needed for strings and messages; else may be `None`.
        vocabulary_size: `V`; ids must be below. `None` if unknown.

    Returns:
        `Prompts`.

    Raises:
        TypeError: `inputs` is none of these, or ids aren't integers.
        ValueError: A prompt is empty, an id is outside the model's vocabulary, a mask
            isn't right-padded, or a string came and there is no tokenizer, or
            messages and there is no chat template.
    """
    if isinstance(inputs, dict):
        return _read_arrays(inputs, vocabulary_size)
    if isinstance(inputs, str):
        rows = _tokenize((inputs,), tokenizer, vocabulary_size)
        return Prompts(rows, "text", True, texts=(inputs,))
    if not isinstance(inputs, (list, tuple)):
        if not (isinstance(inputs, np.ndarray) or ops.is_tensor(inputs)):
            raise TypeError(
                "`inputs` must be a string, a list of strings or of messages, token "
                f"ids or a dictionary. Received: {type(inputs).__name__}"
            )
        inputs = list(ops.convert_to_numpy(inputs))
    if not inputs:
        raise ValueError("`inputs` must hold at least one prompt. Received: []")
    if _are_messages(inputs):
        prompts = _read_chats([inputs], tokenizer, vocabulary_size)
        return replace(prompts, single=True)
    if all(_are_messages(prompt) for prompt in inputs):
        return _read_chats(inputs, tokenizer, vocabulary_size)
    if all(isinstance(prompt, str) for prompt in inputs):
        texts = tuple(inputs)
        rows = _tokenize(texts, tokenizer, vocabulary_size)
        return Prompts(rows, "text", False, texts=texts)
    if all(isinstance(token, numbers.Integral) for token in inputs):
        return Prompts((_check_row(inputs, vocabulary_size),), "ids", True)
    rows = tuple(_check_row(row, vocabulary_size) for row in inputs)
    return Prompts(rows, "ids", False)


def _are_messages(prompt):
    return (
        isinstance(prompt, (list, tuple))
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def _read_chats(chats, tokenizer, vocabulary_size):
    """Conversations, as the texts that the chat template makes of them."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "`inputs` may be messages only if the model's tokenizer has a "
            "`chat_template`; give text. Received: messages, and "
            f"{'no tokenizer' if tokenizer is None else 'a tokenizer without one'}"
        )
    texts = tuple(tokenizer.apply_chat_template(chat) for chat in chats)
    rows = _tokenize(texts, tokenizer, vocabulary_size)
    return Prompts(rows, "text", False, texts=texts, answer_only=True)


def _tokenize(texts, tokenizer, vocabulary_size):
    if tokenizer is None:
        raise ValueError(
            "`inputs` may be text only if there is a tokenizer; give token ids, or "
            f"set the model's `tokenizer`. Received: {quoted(texts[0])}"
        )
    for text in texts:
        if not text:
            raise ValueError("`inputs` must not hold an empty prompt. Received: ''")
    rows = tuple(np.asarray(tokenizer.encode(text), "int32") for text in texts)
    for text, row in zip(texts, rows, strict=True):
        if not row.size:
            raise ValueError(
                "`inputs` must not hold a prompt that the tokenizer gives no ids for. "
                f"Received: {quoted(text)}"
            )
        if vocabulary_size is not None and row.max() >= vocabulary_size:
            raise ValueError(
                "The tokenizer must give ids below the model's vocabulary size, "
                f"{vocabulary_size}. Received: {row.max()}, of {quoted(text)}"
            )
    return rows


def _check_row(row, vocabulary_size):
    """One prompt's ids as an int32 array."""
    ids = ops.convert_to_numpy(row)
    if isinstance(row, str) or ids.ndim != 1 or ids.dtype == object:
        raise TypeError(
            "`inputs` must be all strings or all rows of token ids, or all lists of "
            f"messages. Received a row of type {type(row).__name__} and shape "
            f"{ids.shape}"
        )
    if ids.size == 0:
        raise ValueError("`inputs` must not hold an empty prompt. Received: []")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"`inputs` must hold integer token ids. Received: dtype {ids.dtype}"
        )
    limit = np.iinfo("int32").max if vocabulary_size is None else vocabulary_size
    outside = ids[(ids < 0) | (ids >= limit)]
    if outside.size:
        raise ValueError(
            "`inputs` must hold token ids from 0 to below the vocabulary size, "
            f"{limit}. Received: {outside[0]}"
        )
    return ids.astype("int32")


def _read_arrays(inputs, vocabulary_size):
    missing = {"token_ids", "padding_mask"} - set(inputs)
    if missing and "role" in inputs:
        raise ValueError(
            "`inputs` must have messages in a list, even if there is but one. "
            "Received: a message alone"
        )
    if missing:
        raise ValueError(
            "`inputs`, if a dictionary, must have the keys 'token_ids' and "
            f"'padding_mask'. Received: {sorted(inputs)}"
        )
    ids = ops.convert_to_numpy(inputs["token_ids"])
    mask = ops.convert_to_numpy(inputs["padding_mask"])
    if ids.shape != mask.shape or ids.ndim not in (1, 2):
        raise ValueError(
            "`inputs` must have 'token_ids' and 'padding_mask' of one shape (B, T). "
            f"Received: {ids.shape} and {mask.shape}"
        )
    single = ids.ndim == 1
    ids, mask = np.atleast_2d(ids), np.atleast_2d(mask).astype(bool)
    if not ids.shape[0]:
        raise ValueError("`inputs` must hold at least one prompt. Received none")
    lengths = mask.sum(axis=1)
    if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
        raise ValueError(
            "`inputs` must be padded on the right: a row of 'padding_mask' is ones, "
            f"then zeros. Received: {mask.astype(int).tolist()}"
        )
    rows = tuple(
        _check_row(row[:length], vocabulary_size)
        for row, length in zip(ids, lengths, strict=True)
    )
    return Prompts(rows, "arrays", single, width=ids.shape[1])


def padded_chunks(rows: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts prompts into the chunks that they are run in.

    Args:
        rows: One int32 array a prompt.

    Yields:
        Pairs of a position and the token ids from there on, int32 `(B, C)`, padded on
        the right with zeros.
    """
    sizes = chunk_sizes(max(len(row) for row in rows))
    token_ids = np.zeros((len(rows), sum(sizes)), "int32")
    for padded, row in zip(token_ids, rows, strict=True):
        padded[: len(row)] = row
    first = 0
    for size in sizes:
        yield first, token_ids[:, first : first + size]
        first += size


def write_answers(
    prompts: Prompts,
    new_rows: Sequence[Sequence[int]],
    texts: Sequence[str] | None,
    total_width: int,
    strip_prompt: bool,
) -> Any:
    """The answer in the form of the prompts.

    Args:
        prompts: `Prompts`.
        new_rows: One list of new token ids a row.
        texts: The new text of each row, for the form `"text"`.
        total_width: Columns of the arrays, for the form `"arrays"`.
        strip_prompt: Whether to leave the prompts out.

    Returns:
        A string, a list of strings, a list of ids, a list of lists of ids, or a
        dictionary of NumPy arrays.
    """
    if prompts.form == "text":
        answers = [
            new if strip_prompt or prompts.answer_only else old + new
            for old, new in zip(prompts.texts, texts, strict=True)
        ]
        return answers[0] if prompts.single else answers
    answers = [
        ([] if strip_prompt else old.tolist()) + [int(token) for token in new]
        for old, new in zip(prompts.rows, new_rows, strict=True)
    ]
    if prompts.form == "ids":
        return answers[0] if prompts.single else answers
    ids = np.zeros((len(answers), total_width), "int32")
    mask = np.zeros(ids.shape, bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)], mask[row, : len(answer)] = answer, True
    if prompts.single:
        ids, mask = ids[0], mask[0]
    return {"token_ids": ids, "padding_mask": mask}
