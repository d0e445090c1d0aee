"""Text from tokens that come one by one."""

# What a decoder puts where bytes don't make a character, or don't yet.
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing row of tokens into pieces of text.

    A character of several bytes may be spread over several tokens; it's held back
    until it is whole. Some tokenizers write a token's leading space or not by
    what stands before it, so a piece is the difference between two decodings that
    begin at the same earlier token.

    Args:
        tokenizer: Object with `decode(ids) -> text`.
        prompt_ids: The tokens before the first new one.
    """

    # Enough tokens before a piece for the tokenizer to see what it follows.
    CONTEXT = 5

    def __init__(self, tokenizer, prompt_ids):
        self._tokenizer = tokenizer
        self._ids = [int(token) for token in prompt_ids][-self.CONTEXT :]
        self._shown = len(self._ids)

    def push(self, token_ids):
        """The text that became certain with `token_ids`; may be empty."""
        self._ids.extend(int(token) for token in token_ids)
        return self._take(is_last=False)

    def flush(self):
        """What was held back and won't become whole any more."""
        return self._take(is_last=True)

    def _take(self, is_last):
        # A prompt may end within a character that the first new tokens complete.
        before = self._tokenizer.decode(self._ids[: self._shown]).rstrip(REPLACEMENT)
        after = self._tokenizer.decode(self._ids)
        if after.endswith(REPLACEMENT) and not is_last:
            return ""
        self._ids = self._ids[-self.CONTEXT :]
        self._shown = len(self._ids)
        return after[len(before) :]
