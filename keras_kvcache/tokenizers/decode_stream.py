"""Decodes tokens that come in parts to the text that they have together.

The `tokenizers` library has its own `DecodeStream`. It raises where bytes that made a
character become invalid by the next byte, never gives what it held back at the end, and
waits as long as a text ends in U+FFFD, which may be a character like any other.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from keras_kvcache.tokenizers.bpe import byte_of_letter

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "\ufffd"
# The library's parser accepts a plus sign, too.
_BYTE = re.compile("<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


class DecodeStream:
    """Decodes a growing row of ids; text that was given never changes.

    A decoder of the library is a sequence of steps from strings to strings, at first
    one string a token. Each step goes as far as no later token can change its result:
    characters that are spelled in bytes are held back until they are whole, and runs
    of byte tokens, which the library decodes as a whole, until they end.

    Args:
        backend: The tokenizer, with a decoder that `read_steps` knows.
        steps: The decoder's steps, as `read_steps` gives them.
        skip_special_tokens: Whether to leave out special tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        steps: list[_Step],
        skip_special_tokens: bool = True,
    ):
        self._token = backend.id_to_token
        self._steps = steps
        # The token of an id that names none is None.
        self._left_out = {None}
        if skip_special_tokens:
            added = backend.get_added_tokens_decoder().values()
            self._left_out |= {token.content for token in added if token.special}

    def push(self, ids: Iterable[int]) -> str:
        """Appends ids, and returns the text that no later id can change."""
        tokens = [self._token(int(token_id)) for token_id in ids]
        parts = [token for token in tokens if token not in self._left_out]
        for step in self._steps:
            parts = step.push(parts)
        return "".join(parts)

    def flush(self) -> str:
        """Returns the text that was held back; no more ids follow."""
        parts = []
        for step in self._steps:
            parts = [*step.push(parts), *step.flush()]
        return "".join(parts)


def read_steps(decoder: tokenizers.decoders.Decoder | None) -> list[_Step] | None:
    """The steps of a decoder; `None` if one of them isn't known here."""
    if decoder is None:
        return [_Each(lambda token: " " + token, lambda token: token)]
    try:
        state = json.loads(decoder.__getstate__())
    # The library raises a bare Exception for a decoder that is written in Python.
    except Exception:
        return None
    steps, is_fused = [], False
    for part in _flatten(state):
        step = _read_step(part, is_fused)
        if step is None:
            return None
        steps.append(step)
        is_fused = is_fused or part["type"] in ("Fuse", "ByteLevel")
    return steps


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [inner for outer in state["decoders"] for inner in _flatten(outer)]


def _read_step(state: dict[str, Any], is_fused: bool) -> _Step | None:
    """One step; if `is_fused`, earlier steps made one string of all tokens."""
    kind = state["type"]
    if kind == "Fuse":
        return _Step()
    if is_fused:
        # The library panics where more is to be stripped off an end than there is.
        if kind == "Strip" and not state["stop"]:
            return _Strip(state["content"], state["start"])
        if kind == "Replace" and state["pattern"].get("String"):
            return _Replace(state["pattern"]["String"], state["content"])
        return None
    if kind == "ByteLevel":
        return _ByteLevel()
    if kind == "ByteFallback":
        return _ByteFallback()
    if kind not in ("Replace", "Strip", "Metaspace", "WordPiece", "CTC", "BPEDecoder"):
        return None
    from tokenizers import decoders

    decoder = decoders.Fuse()
    # The only way to a decoder from its state.
    decoder.__setstate__(json.dumps(state).encode())
    if kind in ("Replace", "Strip"):
        return _Each(lambda token: decoder.decode([token]))
    if kind == "CTC":
        return _Distinct(lambda token: decoder.decode([token]))
    if kind == "BPEDecoder":
        return _UntilNext(
            lambda token: decoder.decode([token, ""]),
            lambda token: decoder.decode([token]),
        )
    return _Each(
        lambda token: decoder.decode(["", token]),
        lambda token: decoder.decode([token]),
    )


class _Step:
    """A step that leaves everything as it is."""

    def push(self, parts: list[str]) -> list[str]:
        """Decodes `parts`, and returns the strings that no later part can change."""
        return parts

    def flush(self) -> list[str]:
        """The strings that were held back."""
        return []


class _Each(_Step):
    """Decodes each token on its own, the first in its own way."""

    def __init__(self, decode, decode_first=None):
        self._decode = decode
        self._decode_first = decode_first

    def push(self, parts):
        first = []
        if self._decode_first and parts:
            first, parts = [self._decode_first(parts[0])], parts[1:]
            self._decode_first = None
        return first + [self._decode(part) for part in parts]


class _Distinct(_Step):
    """Decodes each token that differs from the one before."""

    def __init__(self, decode):
        self._decode = decode
        self._last = None

    def push(self, parts):
        decoded = []
        for part in parts:
            if part != self._last:
                decoded.append(self._decode(part))
            self._last = part
        return decoded


class _UntilNext(_Step):
    """Decodes each token once another follows, as the last one is decoded otherwise."""

    def __init__(self, decode, decode_last):
        self._decode = decode
        self._decode_last = decode_last
        self._held = []

    def push(self, parts):
        parts = self._held + parts
        self._held = parts[-1:]
        return [self._decode(part) for part in parts[:-1]]

    def flush(self):
        return [self._decode_last(part) for part in self._held]


class _ByteFallback(_Step):
    """Joins each run of byte tokens: its text, or else U+FFFD for each byte."""

    def __init__(self):
        self._run = bytearray()

    def push(self, parts):
        decoded = []
        for part in parts:
            if byte := _BYTE.fullmatch(part):
                self._run.append(int(byte[1], 16))
                continue
            decoded += [*self.flush(), part]
        return decoded

    def flush(self):
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return [_REPLACEMENT] * len(run)


class _ByteLevel(_Step):
    """Reads GPT-2's letters as bytes; a token with any other stands for itself."""

    def __init__(self):
        self._bytes = byte_of_letter()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, parts):
        return [self._decoder.decode(self._encode(part)) for part in parts]

    def flush(self):
        return [self._decoder.decode(b"", final=True)]

    def _encode(self, token):
        try:
            return bytes([self._bytes[letter] for letter in token])
        except KeyError:
            return token.encode()


class _Strip(_Step):
    """Strips a character off the beginning of one string, at most `start` times."""

    def __init__(self, content, start):
        self._content = content
        self._start = start

    def push(self, parts):
        text = "".join(parts)
        while self._start and text:
            if text[0] != self._content:
                self._start = 0
                break
            text, self._start = text[1:], self._start - 1
        return [text]


class _Replace(_Step):
    """Replaces a pattern in one string."""

    def __init__(self, pattern, content):
        self._pattern = pattern
        self._content = content
        self._held = ""

    def push(self, parts):
        *certain, rest = (self._held + "".join(parts)).split(self._pattern)
        # A possible beginning of the pattern waits for the rest of it.
        begun = range(min(len(self._pattern) - 1, len(rest)), 0, -1)
        held = next((n for n in begun if self._pattern.startswith(rest[-n:])), 0)
        self._held = rest[len(rest) - held :]
        rest = rest[: len(rest) - held]
        return [self._content.join([*certain, rest])]

    def flush(self):
        return [self._held]
