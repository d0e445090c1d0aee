"""Byte-pair vocabularies: byte-level ones, and those of SentencePiece."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from keras_kvcache.errors import quoted

if TYPE_CHECKING:
    import tokenizers


# GPT-2's words: contractions, letters, numbers and the rest, each with at most
# one space before it, and runs of space.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The words of GPT-4 and its many descendants, which differ in how many digits
# stay together.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (_GPT4 % "1,3",)
_QWEN2 = (_GPT4 % "1",)
# For each pre-tokenizer a GGUF file may name, its regular expressions. Each
# splits the pieces the one before it left, and what it doesn't match stays a
# piece too.
_SPLITS = {
    # What llama.cpp falls back on when a file names none.
    "default": (
        r"[\p{P}\$\+<=>\^~\|]+",
        _GPT2,
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ),
    "gpt-2": (_GPT2,),
    # Every digit on its own.
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
# Llama 3 takes a word that is a token whole, whatever the merges say.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
# Qwen composes characters before it splits.
_COMPOSED = ("qwen2", "deepseek-r1-qwen")


@lru_cache(maxsize=1)
def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, others letters from U+0100."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def byte_level_backend(
    tokens: Sequence[str], merges: Sequence[tuple[str, ...]], pre_type: str
) -> tokenizers.Tokenizer:
    """Builds a byte-level BPE tokenizer (Radford et al., 2019).

    Args:
        tokens: The token of each id, bytes spelled in GPT-2's alphabet.
        merges: Pairs of tokens, the first to be merged first.
        pre_type: How text is split before merging, by the name GGUF files use.

    Raises:
        ValueError: `pre_type` is unknown or a merge isn't a pair whose parts
            and result are tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    if pre_type not in _SPLITS:
        raise ValueError(
            f"the pre-tokenizer must be one of {', '.join(_SPLITS)}. Received: "
            f"{quoted(pre_type)}"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or any(part not in ids for part in (*merge, "".join(merge))):
            raise ValueError(
                "a merge must be two tokens that form a third. Received: "
                f"{quoted(' '.join(merge))}"
            )
    backend = tokenizers.Tokenizer(
        models.BPE(ids, list(merges), ignore_merges=pre_type in WHOLE_WORDS)
    )
    if pre_type in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
            for pattern in _SPLITS[pre_type]
        ]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


_SPACE = "\u2581"


def sentence_piece_backend(
    tokens: Sequence[str],
    scores: Sequence[float],
    normal: Sequence[bool],
    *,
    unknown_token: str | None,
    add_space_prefix: bool,
) -> tokenizers.Tokenizer:
    """Builds a SentencePiece BPE tokenizer with byte fallback.

    Args:
        tokens: The token of each id; spaces are written as U+2581.
        scores: Of each token; the pair whose union scores highest is merged
            first.
        normal: Whether each token may come about by merging.
        unknown_token: What stands for a byte that has no token.
        add_space_prefix: Whether a text begins with a space it doesn't show.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    ids = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            ids,
            _merges(tokens, scores, normal),
            unk_token=unknown_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    show_spaces = normalizers.Replace(" ", _SPACE)
    hide_spaces = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if add_space_prefix:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), show_spaces]
        )
        backend.decoder = decoders.Sequence(
            [*hide_spaces, decoders.Strip(content=" ", left=1)]
        )
    else:
        backend.normalizer = show_spaces
        backend.decoder = decoders.Sequence(hide_spaces)
    return backend


def _merges(
    tokens: Sequence[str], scores: Sequence[float], normal: Sequence[bool]
) -> list[tuple[str, str]]:
    """Derives the merges from the scores.

    A file of this kind lists no merges: any two neighbours whose union is a
    token may merge, the best-scored union first. Of the ways to split one token
    the longest left part goes first.
    """
    score_of = {
        token: score
        for token, score, mergeable in zip(tokens, scores, normal, strict=True)
        if mergeable
    }
    ranked = []
    for token, score in score_of.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in score_of and right in score_of:
                ranked.append((-score, -cut, left, right))
    # Sorting is stable: of equal scores and cuts, the lower id goes first.
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]
