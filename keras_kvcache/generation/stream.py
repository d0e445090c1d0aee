"""New tokens as they appear."""

from typing import Any

from keras_kvcache.generation.prompts import Prompts
from keras_kvcache.generation.rows import NO_TOKEN
from keras_kvcache.tokenizers.detokenizer import Detokenizer


class TextStream:
    """An iterator over what generation adds.

    For one prompt it gives pieces of text, or lists of ids if the prompt was ids;
    for a list of prompts lists of these, one a row, with an empty piece for a row
    that adds nothing.

    Attributes:
        token_ids: The new ids of each row up to now, a list of lists.
    """

    def __init__(self, bursts: Any, prompts: Prompts, tokenizer: Any) -> None:
        self.token_ids = [[] for _ in prompts.rows]
        self._pieces = _pieces(bursts, prompts, tokenizer, self.token_ids)

    def __repr__(self):
        counts = ", ".join(str(len(row)) for row in self.token_ids)
        return f"<TextStream, new tokens up to now: {counts}>"

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._pieces)


# Not a method: it would hold the stream that holds it, and so keep the caches of one
# that was left before its end.
def _pieces(bursts, prompts, tokenizer, token_ids):
    is_text = prompts.form == "text"
    texts = zip(prompts.rows, prompts.texts, strict=True) if is_text else ()
    detokenizers = [Detokenizer(tokenizer, row, text) for row, text in texts]
    for tokens in bursts:
        added = [burst[burst != NO_TOKEN].tolist() for burst in tokens]
        for row, new in zip(token_ids, added, strict=True):
            row.extend(new)
        if is_text:
            pairs = zip(detokenizers, added, strict=True)
            added = [detokenizer.push(new) for detokenizer, new in pairs]
        if any(added):
            yield added[0] if prompts.single else added
    held_back = [detokenizer.flush() for detokenizer in detokenizers]
    if any(held_back):
        yield held_back[0] if prompts.single else held_back
