"""The tokenizer inside a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras_kvcache.errors import quoted
from keras_kvcache.families.gguf_keys import REQUIRED, get_value
from keras_kvcache.tokenizers.bpe import (
    WHOLE_WORDS,
    byte_level_backend,
    sentence_piece_backend,
)
from keras_kvcache.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_PREFIX = "tokenizer.ggml"
# Kinds of token, from the GGUF specification. Tokens that are unused or stand
# for a byte (5 and 6) take part in nothing here: bytes are found by their name.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# What chat models end a turn with. Files often name only one of them as EOS.
_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
)


def build_tokenizer(
    metadata: dict[str, Any], vocabulary_size: int | None = None
) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        metadata: The file's metadata, by key.
        vocabulary_size: `V` of the model, which may have more ids than there are
            tokens; `None` for the number of tokens.

    Raises:
        ValueError: A key is missing or malformed, or the tokenizer is of a
            kind this package doesn't know. The message names the key.
    """
    model = get_value(metadata, f"{_PREFIX}.model", str)
    if model not in _BACKENDS:
        raise ValueError(
            f"'{_PREFIX}.model' must be one of {tuple(_BACKENDS)}. Received: "
            f"{quoted(model)}"
        )
    tokens = _get_list(metadata, "tokens", str)
    if not tokens or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"'{_PREFIX}.tokens' must hold every token once. Received: {len(tokens)}, "
            f"of which {len(set(tokens))} differ"
        )
    kinds = [_NORMAL] * len(tokens)
    if f"{_PREFIX}.token_type" in metadata:
        kinds = _get_list(metadata, "token_type", int, len(tokens))
    backend, usually_add_bos = _BACKENDS[model](metadata, tokens, kinds)
    _add_whole_tokens(backend, tokens, kinds)
    size = max(vocabulary_size or 0, len(tokens))
    bos_token_id = _token_id(metadata, "bos", size)
    return Tokenizer(
        backend,
        bos_token_id=bos_token_id,
        eos_token_id=_token_id(metadata, "eos", size),
        stop_token_ids=_stop_token_ids(metadata, tokens, kinds, size),
        add_bos=get_value(
            metadata,
            f"{_PREFIX}.add_bos_token",
            bool,
            usually_add_bos and bos_token_id is not None,
        ),
        add_eos=get_value(metadata, f"{_PREFIX}.add_eos_token", bool, False),
        chat_template=_chat_template(metadata),
        special_tokens=_special_tokens(metadata, tokens),
    )


def _build_byte_level(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The backend, and whether such tokenizers usually begin with BOS."""
    pre_type = get_value(metadata, f"{_PREFIX}.pre", str, "default")
    merges = _get_list(metadata, "merges", str)
    backend = byte_level_backend(
        tokens, [tuple(merge.split(" ")) for merge in merges], pre_type
    )
    return backend, pre_type in WHOLE_WORDS


def _build_sentence_piece(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The backend, and whether such tokenizers usually begin with BOS."""
    unknown_id = _token_id(metadata, "unknown", len(tokens))
    if unknown_id is None and _UNKNOWN in kinds:
        unknown_id = kinds.index(_UNKNOWN)
    backend = sentence_piece_backend(
        tokens,
        _get_list(metadata, "scores", float, len(tokens)),
        [kind == _NORMAL for kind in kinds],
        unknown_token=None if unknown_id is None else tokens[unknown_id],
        add_space_prefix=get_value(metadata, f"{_PREFIX}.add_space_prefix", bool, True),
    )
    return backend, True


# By the names GGUF files use.
_BACKENDS = {"gpt2": _build_byte_level, "llama": _build_sentence_piece}


def _add_whole_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]
) -> None:
    """Adds the tokens that are matched before a text is split.

    Control tokens and the unknown token are left out of decoded text; tokens a
    model's author defined are part of it.
    """
    from tokenizers import AddedToken

    special, defined = [], []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            defined.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(defined)


def _chat_template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name."""
    key = "tokenizer.chat_template"
    default = get_value(metadata, key, str, None)
    names = [name for name in metadata if name.startswith(f"{key}.")]
    named = {n.removeprefix(f"{key}."): get_value(metadata, n, str) for n in names}
    if not named:
        return default
    return named if default is None else {**named, "default": default}


def _special_tokens(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """The texts of tokens that chat templates call by name."""
    # Spelled as in the format.
    names = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
    found = {}
    for name in ("unk", "sep", "pad", "cls", "mask"):
        token_id = _token_id(metadata, names.get(name, name), len(tokens))
        if token_id is not None:
            found[f"{name}_token"] = tokens[token_id]
    return found


def _stop_token_ids(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int], size: int
) -> tuple[int, ...]:
    """The ids that end a text or a turn, EOS first, each once."""
    named = [_token_id(metadata, name, size) for name in ("eos", "eot", "eom")]
    ids = {token: index for index, token in enumerate(tokens)}
    usual = [
        ids[token]
        for token in _END_OF_TURN
        if token in ids and kinds[ids[token]] in (_CONTROL, _USER_DEFINED)
    ]
    return tuple(dict.fromkeys(i for i in named + usual if i is not None))


def _token_id(metadata: dict[str, Any], name: str, size: int) -> int | None:
    key = f"{_PREFIX}.{name}_token_id"
    token_id = get_value(metadata, key, int, None)
    if token_id is not None and not 0 <= token_id < size:
        raise ValueError(
            f"{quoted(key)} must be the id of one of {size} tokens. Received: "
            f"{token_id}"
        )
    return token_id


def _get_list(
    metadata: dict[str, Any], name: str, kind: type, length: int | None = None
) -> list:
    """A list whose items are of one kind, of the length given if one is."""
    key = f"{_PREFIX}.{name}"
    values = get_value(metadata, key, list, REQUIRED)
    # The items of a list in a GGUF file all have the type of the first.
    if values and type(values[0]) is not kind:
        raise ValueError(
            f"{quoted(key)} must be a list of {kind.__name__}. Received: "
            f"one that begins with {quoted(values[0])}"
        )
    if length is not None and len(values) != length:
        raise ValueError(
            f"{quoted(key)} must have an item for each of {length} tokens. Received: "
            f"{len(values)}"
        )
    return values
