"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_kvcache.errors import quoted, shortened
from keras_kvcache.loaders.json_file import read_json
from keras_kvcache.tokenizers.tokenizer import Tokenizer, vocabulary_size_of
from keras_kvcache.tokenizers.unread_tokenizer import UnreadTokenizer, find_older_files

if TYPE_CHECKING:
    import tokenizers

_VOCABULARY_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_OLDER_CONFIG_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_FOLDER = "additional_chat_templates"
_GENERATION_FILE = "generation_config.json"


def read_tokenizer(
    folder: Path, model: dict[str, Any]
) -> Tokenizer | UnreadTokenizer | None:
    """Reads the tokenizer of a model.

    Args:
        folder: Of the model.
        model: Its config, which names ids where the tokenizer's doesn't.

    Returns:
        The tokenizer, or `None` if it has no files. If it has files, but no
        `tokenizer.json`, an `UnreadTokenizer`. It stops at the ids that
        `generation_config.json` names, or else the model's config, and at the
        tokenizer's own end of text.

    Raises:
        ValueError: A file is damaged or says what can't be done; the message
            names the file and the key.
    """
    if not (folder / _VOCABULARY_FILE).exists():
        return _unread_tokenizer(folder, model)
    backend = _read_backend(folder / _VOCABULARY_FILE)
    config = read_json(folder / _OLDER_CONFIG_FILE, {})
    config = {**config, **read_json(folder / _CONFIG_FILE, {})}
    generation = read_json(folder / _GENERATION_FILE, {})
    bos_id = _special_id(backend, config, model, "bos")
    eos_id = _special_id(backend, config, model, "eos")
    before, after = _added_ids(backend)
    bos_id = _added_token("bos", before, bos_id)
    eos_id = _added_token("eos", after, eos_id)
    stop_ids = generation.get("eos_token_id", model.get("eos_token_id"))
    stop_ids = _known_ids(backend, model, "eos_token_id", stop_ids)
    return Tokenizer(
        backend,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        stop_token_ids=tuple(
            dict.fromkeys([*stop_ids, *([] if eos_id is None else [eos_id])])
        ),
        add_bos=bool(before),
        add_eos=bool(after),
        chat_template=_chat_template(folder, config),
        special_tokens=_special_tokens(config),
    )


def _unread_tokenizer(folder: Path, model: dict[str, Any]) -> UnreadTokenizer | None:
    files = find_older_files(folder)
    if not files:
        return None
    generation = read_json(folder / _GENERATION_FILE, {})
    stop_ids = generation.get("eos_token_id", model.get("eos_token_id"))
    return UnreadTokenizer(
        folder, files, _known_ids(None, model, "eos_token_id", stop_ids)
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    # The library raises a bare Exception for a file it can't parse.
    except Exception as error:
        raise ValueError(f"{path.name} is damaged: {shortened(error, 500)}") from error
    # A tokenizer saved in the midst of training cuts and pads what it encodes.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_id(
    backend: tokenizers.Tokenizer,
    config: dict[str, Any],
    model: dict[str, Any],
    name: str,
) -> int | None:
    """The id of the first or last token of a text, by its name or by the model."""
    key = f"{name}_token"
    if key not in config:
        ids = _known_ids(backend, model, f"{key}_id", model.get(f"{key}_id"))
        return ids[0] if ids else None
    token = config[key]
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    token_id = backend.token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise ValueError(
            f"`{key}` of {_CONFIG_FILE} must be a token of the vocabulary. Received: "
            f"{quoted(config[key])}"
        )
    return token_id


def _known_ids(
    backend: tokenizers.Tokenizer | None, model: dict[str, Any], key: str, value: Any
) -> list[int]:
    """An id or a list of ids as a list, without those that the model hasn't.

    Such ids, like GPT-2's in a config of a smaller vocabulary, never occur. Ids that
    the model has and the tokenizer hasn't are kept.
    """
    ids = value if isinstance(value, list) else [value] if value is not None else []
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"`{key}` must be an id or ids. Received: {quoted(value)}")
    size = model.get("vocab_size")
    if not isinstance(size, int):
        size = 0 if backend is None else vocabulary_size_of(backend)
    return [i for i in ids if 0 <= i < size]


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The texts of tokens that chat templates call by name."""
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    tokens = {}
    for name, token in named.items():
        token = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    return tokens


def _added_ids(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after every text."""
    for text in itertools.chain(("a",), backend.get_vocab()):
        bare = backend.encode(text, add_special_tokens=False).ids
        if bare:
            break
    else:
        return [], []
    whole = backend.encode(text).ids
    for begin in range(len(whole) - len(bare) + 1):
        end = begin + len(bare)
        if whole[begin:end] == bare:
            return whole[:begin], whole[end:]
    raise ValueError(f"{_VOCABULARY_FILE} must leave a text's own ids in one piece.")


def _added_token(name: str, added: list[int], token_id: int | None) -> int | None:
    """The one token that the tokenizer adds, or `None`; it must be the named one.

    `add_bos_token` of the config isn't asked: it is for making a `tokenizer.json`.
    """
    if len(added) > 1 or (added and token_id not in (None, *added)):
        raise ValueError(
            f"{_VOCABULARY_FILE} must add the `{name}_token`, id {token_id}, or "
            f"nothing to a text. Received: a tokenizer that adds {added}"
        )
    return added[0] if added else token_id


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The template, or several by name: from files of their own, or the config."""
    named = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))
    }
    if (folder / _TEMPLATE_FILE).exists():
        default = (folder / _TEMPLATE_FILE).read_text(encoding="utf-8")
        return {**named, "default": default} if named else default
    if named:
        return named
    templates = config.get("chat_template")
    if templates is None or isinstance(templates, str):
        return templates
    try:
        by_name = {one["name"]: one["template"] for one in templates}
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"`chat_template` of {_CONFIG_FILE} must be a template or a list of named "
            f"ones. Received: {type(templates).__name__}"
        ) from error
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    return by_name
