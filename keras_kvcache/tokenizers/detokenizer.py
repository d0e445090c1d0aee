"""New text from tokens that come one by one.

Prompt and answer are decoded together. New is this text without the longest prefix that
it has in common with the decoded prompt: mostly all that comes after the prompt.
"""

import os
from collections.abc import Iterable
from typing import Any

# What a decoder puts where bytes don't make a character, or don't yet.
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Gives the new text of a growing row of tokens, piece by piece.

    The pieces, joined, are the `new_text` of the row, however its tokens are split into
    calls. That holds for the tokenizers of this package, and for others if a further
    token changes the decoded text at its end only, by completing a character or
    appending.

    Args:
        tokenizer: Object with `decode(ids) -> text`. If it has a method
            `decode_stream()`, that returns `None`, or an object with
            `push(ids) -> text` and `flush() -> text`, which decodes in parts.
        prompt_ids: The tokens before the first new one.
        prompt: The text that they were made of, if there is one.
    """

    def __init__(self, tokenizer, prompt_ids, prompt=None):
        make_stream = getattr(tokenizer, "decode_stream", lambda: None)
        self._stream = make_stream() or WindowedStream(tokenizer.decode)
        shown = shown_text(tokenizer, prompt_ids, prompt)
        settled = self._stream.push([int(token) for token in prompt_ids])
        # The end of the prompt's text, which the next tokens may change.
        self._shown = shown.removeprefix(settled)

    def push(self, token_ids: Iterable[int]) -> str:
        """The new text that became certain with `token_ids`; may be empty."""
        return self._new(self._stream.push([int(token) for token in token_ids]))

    def flush(self) -> str:
        """The new text that was held back, now that no token follows."""
        return self._new(self._stream.flush())

    def _new(self, text):
        common = len(os.path.commonprefix([self._shown, text]))
        self._shown = "" if common < len(text) else self._shown[common:]
        return text[common:]


def new_text(
    tokenizer: Any,
    prompt_ids: Iterable[int],
    new_ids: Iterable[int],
    prompt: str | None = None,
) -> str:
    """The text that new tokens add to a prompt; arguments as in `Detokenizer`."""
    shown = shown_text(tokenizer, prompt_ids, prompt)
    whole = tokenizer.decode([int(token) for token in (*prompt_ids, *new_ids)])
    return whole[len(os.path.commonprefix([shown, whole])) :]


def shown_text(tokenizer: Any, prompt_ids: Iterable[int], prompt: str | None) -> str:
    """The text of a prompt as decoded, without special tokens for example.

    Some decoders write a space only with the word that follows it. So spaces at the end
    of the prompt are added: else they would count as new text.
    """
    decoded = tokenizer.decode([int(token) for token in prompt_ids])
    if prompt is not None and prompt.startswith(decoded):
        if prompt[len(decoded) :].isspace():
            return prompt
    return decoded


class WindowedStream:
    """A decoder in parts, made of a function that decodes whole rows.

    The newest tokens are decoded again and again, behind as many of those before
    them as the decoder needs to see what they follow. U+FFFD at the end of a text is
    held back, as it may become a character.

    Args:
        decode: Function of a list of ids that gives their text.
    """

    # A window of more ids than the first number is cut; as many as the second stay, or
    # more.
    LONGEST, CONTEXT = 48, 8
    # A longer run of U+FFFD is given: it won't become valid any more.
    MOST_HELD = 256

    def __init__(self, decode):
        self._decode = decode
        self._ids = []
        self._given = 0
        self._longest = self.LONGEST

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with `ids`; may be empty."""
        self._ids += ids
        text = self._decode(self._ids)
        settled = text.rstrip(REPLACEMENT)
        if 0 < len(text) - len(settled) <= self.MOST_HELD:
            return self._give(settled)
        piece = self._give(text)
        if len(self._ids) > self._longest:
            self._begin_anew(text)
        return piece

    def flush(self) -> str:
        """The text that was held back."""
        return self._give(self._decode(self._ids))

    def _give(self, text):
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _begin_anew(self, text):
        """Cuts the window: forgets ids that later text doesn't depend on."""
        for length in range(self.CONTEXT, self.LONGEST):
            ids = self._ids[-length:]
            context = self._decode(ids)
            # A decoder may leave out the space before its first token.
            if context.strip() and text.endswith(context.lstrip(" ")):
                self._ids, self._given = ids, len(context)
                self._longest = self.LONGEST
                return
        self._longest = 2 * len(self._ids)
