"""A tokenizer: text to ids and back, and conversations to text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kvcache.errors import quoted, shortened
from keras_kvcache.runtime import atomic
from keras_kvcache.tokenizers.chat_template import render_chat_template, without_nulls
from keras_kvcache.tokenizers.decode_stream import DecodeStream, read_steps

if TYPE_CHECKING:
    import tokenizers

_VOCABULARY_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
# What `save` writes.
TOKENIZER_FILES = (_VOCABULARY_FILE, _CONFIG_FILE)
# Arguments of transformers' `apply_chat_template`. As variables of the template they
# would be ignored.
_FOREIGN_ARGUMENTS = {
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
    "truncation",
}


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: A `tokenizers.Tokenizer`, which holds vocabulary and rules.
        bos_token_id: The id that begins a sequence, if there is one.
        eos_token_id: The id that ends one, if there is one.
        stop_token_ids: The ids after which generation should stop.
        add_bos: Whether `encode` begins with `bos_token_id`.
        add_eos: Whether `encode` ends with `eos_token_id`.
        chat_template: The Jinja template of the model's conversations, or several by
            name: `"default"`, and `"tool_use"` for those with tools.
        special_tokens: Texts of further tokens that templates ask for, by names like
            `"pad_token"`.

    Attributes:
        vocabulary_size: The largest id of a token, plus one. Not every smaller id need
            name a token, and the model's own vocabulary size may be larger.

    Raises:
        ValueError: An id isn't an int32 from 0 on, or an id to add is None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        stop_token_ids: Sequence[int] = (),
        add_bos: bool = False,
        add_eos: bool = False,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        self._backend = backend
        self.vocabulary_size = vocabulary_size_of(backend)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.stop_token_ids = tuple(stop_token_ids)
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        for name, token_id in (
            ("bos_token_id", bos_token_id),
            ("eos_token_id", eos_token_id),
            *(("stop_token_ids", token_id) for token_id in self.stop_token_ids),
        ):
            if token_id is not None:
                self._check_id(name, token_id)
        if add_bos and bos_token_id is None:
            raise ValueError("`add_bos=True` needs a `bos_token_id`. Received: None")
        if add_eos and eos_token_id is None:
            raise ValueError("`add_eos=True` needs an `eos_token_id`. Received: None")

    def __repr__(self) -> str:
        template = "with" if self.chat_template is not None else "without"
        return (
            f"<{type(self).__name__} vocabulary_size={self.vocabulary_size}, "
            f"bos_token_id={self.bos_token_id}, eos_token_id={self.eos_token_id}, "
            f"stop_token_ids={self.stop_token_ids}, {template} chat_template>"
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Special tokens written in the text, like `<|im_end|>`, become their ids.
        A BOS or EOS id that the model expects is added unless it is there.

        Raises:
            TypeError: `text` isn't a string.
            ValueError: `text` can't be written as UTF-8.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string. Received: {quoted(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`text` must be valid Unicode: {shortened(error, 500)}."
            ) from error
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self.add_bos and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        if self.add_eos and ids[-1:] != [self.eos_token_id]:
            ids = [*ids, self.eos_token_id]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; bytes that form no character become U+FFFD.

        Args:
            ids: Integers, one axis. Those that name no token give no text: a model
                whose embedding has more rows than there are tokens may sample them.
            skip_special_tokens: Whether to leave out special tokens.

        Raises:
            TypeError: `ids` aren't integers.
            ValueError: There is more than one axis, or an id is no int32
                from 0 on.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise ValueError(f"`ids` must have one axis. Received: shape {ids.shape}")
        if ids.size == 0:
            return ""
        if ids.dtype.kind not in "iu":
            raise TypeError(f"`ids` must be integers. Received: dtype {ids.dtype}")
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < 2**31:
                raise ValueError(
                    f"`ids` must be from 0 to 2**31 - 1. Received: {extreme}"
                )
        return self._backend.decode(
            ids.tolist(), skip_special_tokens=skip_special_tokens
        )

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream | None:
        """Decodes in parts, whose texts joined are the text that `decode` gives.

        Args:
            skip_special_tokens: Whether to leave out special tokens.

        Returns:
            A new `DecodeStream`; `None` if the decoder of `backend` isn't known here.
        """
        steps = read_steps(self._backend.decoder)
        if steps is None:
            return None
        return DecodeStream(self._backend, steps, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """A conversation as the text the model was trained on, as in transformers.

        Special tokens written in a message become special tokens of the prompt:
        whoever writes messages can write turns. Don't pass on strangers' text
        where that matters.

        Args:
            messages: The turns, each with a `"role"` and most often a `"content"`.
                Entries that are `None` count as absent.
            add_generation_prompt: Whether to open the assistant's turn at the end;
                `None` for `True`, or `False` where the last message is continued.
            tools: JSON schemas of the functions that the model may call.
            documents: What the model may read, dictionaries, often with a `"title"`
                and a `"text"`.
            continue_final_message: Whether to end within the last message, which the
                model then continues; or the key to continue, if not `"content"`.
            chat_template: Another template than the model's, or the name of one of
                its own.
            tokenize: Whether to return the text's ids instead; no BOS or EOS is added.
            **variables: What else the template asks for, such as `enable_thinking`;
                they replace special tokens of the same names.

        Raises:
            TypeError: `messages` isn't a list of such dictionaries, or an argument
                is one of transformers' that has no meaning here.
            ValueError: The model has no template, or the template fails.
        """
        foreign = sorted(_FOREIGN_ARGUMENTS & set(variables))
        if foreign:
            raise TypeError(
                "`apply_chat_template` gives a string, or a list of ids with "
                f"`tokenize=True`. Received: {', '.join(foreign)}"
            )
        text = render_chat_template(
            self._choose_template(chat_template, tools),
            without_nulls(messages),
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{
                "bos_token": self._text_of(self.bos_token_id),
                "eos_token": self._text_of(self.eos_token_id),
                **self.special_tokens,
                **variables,
            },
        )
        if tokenize:
            return self._backend.encode(text, add_special_tokens=False).ids
        return text

    def _choose_template(self, chosen: str | None, tools: Any) -> str:
        """The template that was asked for, or the one for tools, or the default."""
        templates = self.chat_template
        if isinstance(templates, Mapping):
            if chosen is None:
                suits_tools = tools is not None and "tool_use" in templates
                chosen = "tool_use" if suits_tools else "default"
                if chosen not in templates:
                    raise ValueError(
                        "`chat_template` must name one of the model's templates, as "
                        f"none is 'default': {quoted(', '.join(templates))}. Received: "
                        "None"
                    )
            return templates.get(chosen, chosen)
        chosen = templates if chosen is None else chosen
        if chosen is None:
            raise ValueError(
                "`apply_chat_template` needs a chat template; this model has none."
            )
        return chosen

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the tokenizer into a folder, making it if need be.

        Each of the two files appears whole or not at all.
        """
        directory = Path(directory)
        config = {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "stop_token_ids": list(self.stop_token_ids),
            "add_bos": self.add_bos,
            "add_eos": self.add_eos,
            "chat_template": self.chat_template,
            "special_tokens": self.special_tokens,
        }
        for name, text in (
            (_VOCABULARY_FILE, self._backend.to_str()),
            (_CONFIG_FILE, json.dumps(config, indent=2)),
        ):
            with atomic.writing(directory / name) as staged:
                staged.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: The folder lacks one of the two files.
            ValueError: One of them is damaged.
        """
        import tokenizers

        directory = Path(directory)
        vocabulary = (directory / _VOCABULARY_FILE).read_bytes()
        config = (directory / _CONFIG_FILE).read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(vocabulary)
            return cls(backend, **json.loads(config))
        # The library raises a bare Exception for a file it can't parse.
        except Exception as error:
            raise ValueError(
                f"{directory} must hold a saved tokenizer, but "
                f"{_VOCABULARY_FILE} or {_CONFIG_FILE} is damaged: "
                f"{shortened(error, 500)}."
            ) from error

    def _check_id(self, name: str, token_id: int) -> None:
        # A model may have more ids than its tokenizer has tokens, and stop at one.
        if not 0 <= token_id < 2**31:
            raise ValueError(
                f"`{name}` must be ids from 0 to 2**31 - 1. Received: {token_id}"
            )

    def _text_of(self, token_id: int | None) -> str:
        text = None if token_id is None else self._backend.id_to_token(token_id)
        return text or ""


def vocabulary_size_of(backend: tokenizers.Tokenizer) -> int:
    """The largest id plus one: a vocabulary may have gaps."""
    return max(backend.get_vocab().values(), default=-1) + 1
