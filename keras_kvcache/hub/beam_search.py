"""keras-hub's beam search, run as rows of generation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from keras import ops

from keras_kvcache.caches import repeat_rows
from keras_kvcache.generation import Generator
from keras_kvcache.generation.buckets import capacity_for
from keras_kvcache.generation.prompts import padded_chunks
from keras_kvcache.generation.rows import padded_stop_ids, start_rows
from keras_kvcache.samplers.hub_beams import HubBeams
from keras_kvcache.samplers.stateful import NO_TOKEN


def search_beams(
    generator: Generator,
    sampler: Any,
    token_ids: np.ndarray,
    mask: np.ndarray,
    stop_token_ids: Sequence[int] | None,
) -> np.ndarray:
    """Continues prompts by the best of a keras-hub sampler's beams.

    Prompts are read once each, then each row of the cache is repeated for the beams.

    Args:
        generator: Of the model.
        sampler: A `keras_hub.samplers.BeamSampler`.
        token_ids: int `(B, T)`, prompts and padding.
        mask: bool `(B, T)`, `True` for the prompts.
        stop_token_ids: Ids that end the search, or `None`.

    Returns:
        int `(B, T)`, as the sampler gives them.

    Raises:
        TypeError: All beams are asked for, which `generate` has no place for.
    """
    beams, (batch, width) = sampler.num_beams, token_ids.shape
    if sampler.return_all_beams:
        raise TypeError(
            "`sampler` must give the best beam only, `return_all_beams=False`. "
            "Received: return_all_beams=True"
        )
    lengths = mask.sum(axis=1)
    shortest = int(lengths.min())
    capacity = capacity_for(width, generator.max_sequence_length)
    cache = generator.init_cache(batch, capacity)
    if shortest > 1:
        # The last token is run by the first step of the search.
        for first, chunk in padded_chunks([row[: shortest - 1] for row in token_ids]):
            count = np.clip(np.full(batch, shortest - 1 - first), 0, chunk.shape[1])
            cache, _ = generator.extend(
                cache, chunk, np.full(batch, first, "int32"), count.astype("int32")
            )
    padded = np.full((batch * beams, capacity), NO_TOKEN, "int32")
    padded[:, :width] = np.repeat(token_ids, beams, axis=0)
    rows = start_rows(
        repeat_rows(cache, beams),
        [
            row[:length]
            for row, length in zip(padded, lengths.repeat(beams), strict=True)
        ],
        ends=np.full(batch * beams, width),
        stop_token_ids=(),
        seed=0,
        sampler=None,
        width=capacity,
    )
    rows = replace(rows, tokens=padded)
    search = HubBeams(sampler, padded_stop_ids(stop_token_ids or ()))
    rows = replace(
        rows,
        sampler=search.start(rows),
        index=np.full(batch * beams, shortest - 1, "int32"),
    )
    while not ops.convert_to_numpy(rows.done).all():
        rows, _ = generator.decode(rows, sampler=search)
    score = ops.convert_to_numpy(rows.sampler["score"]).reshape(batch, beams)
    best = np.arange(batch) * beams + score.argmax(axis=1)
    return ops.convert_to_numpy(rows.tokens)[best, :width]
