"""How far generation may go."""

from collections.abc import Iterable

import numpy as np

from keras_kvcache.runtime.concrete import is_integer

# Ends and ids are int32.
MOST = int(np.iinfo("int32").max)


def row_ends(lengths, max_length, max_new_tokens, context, may_be_full=False):
    """The position past the last token of each row.

    Args:
        lengths: Length of each prompt.
        max_length: The most tokens of prompt and answer together, or `None`.
        max_new_tokens: The most new tokens, or `None`.
        context: The most positions that the model knows, or `None` if endless.
        may_be_full: Whether a row may be without room for a new token.

    Returns:
        An int32 array, one end a row. The smallest limit given counts.

    Raises:
        TypeError: A limit isn't an integer.
        ValueError: A limit isn't positive, none is given, or one leaves a row no
            room for a new token.
    """
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is None:
            continue
        if not is_integer(value):
            raise TypeError(f"`{name}` must be an integer. Received: {value!r}")
        if value <= 0:
            raise ValueError(f"`{name}` must be positive. Received: {value}")
    if max_length is None and max_new_tokens is None and context is None:
        raise ValueError(
            "`max_length` or `max_new_tokens` must be given for a model without a "
            "longest sequence. Received: None for both"
        )
    room = 0 if may_be_full else 1
    longest = max(lengths)
    if context is not None and longest + room > context:
        raise ValueError(
            "`inputs` must leave room for a new token in the model's context of "
            f"{context} tokens. Received: a prompt of {longest} tokens"
        )
    if max_length is not None and longest + room > max_length:
        raise ValueError(
            "`max_length` counts the prompt too and must leave room for a new "
            f"token. Received: max_length={max_length}, a prompt of {longest} tokens"
        )
    limits = [limit for limit in (max_length, context) if limit is not None]
    if max_new_tokens is not None:
        ends = [min(length + max_new_tokens, *limits, MOST) for length in lengths]
    else:
        ends = [min(limits)] * len(lengths)
    return np.array(ends, "int32")


def read_stop_token_ids(stop_token_ids, tokenizer):
    """The ids that end a row, as a sorted tuple.

    Args:
        stop_token_ids: `"auto"` for the tokenizer's (none without a tokenizer),
            `None` for none, an id or ids.
        tokenizer: Object with `stop_token_ids`, or `None`.

    Raises:
        TypeError: They aren't ids.
    """
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        stop_token_ids = () if tokenizer is None else tokenizer.stop_token_ids
    if stop_token_ids is None:
        return ()
    if is_integer(stop_token_ids):
        stop_token_ids = (stop_token_ids,)
    is_iterable = isinstance(stop_token_ids, Iterable)
    ids = list(stop_token_ids) if is_iterable else [None]
    if isinstance(stop_token_ids, str) or not all(_is_id(token) for token in ids):
        raise TypeError(
            "`stop_token_ids` must be 'auto', `None`, an id or ids, integers from 0 "
            f"on. Received: {stop_token_ids!r}"
        )
    return tuple(sorted({int(token) for token in ids}))


def _is_id(token):
    return is_integer(token) and 0 <= token <= MOST
