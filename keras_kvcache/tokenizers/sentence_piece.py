"""SentencePiece BPE vocabularies, as of Llama 2 and Mistral."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

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
    """The merges that the scores imply.

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
