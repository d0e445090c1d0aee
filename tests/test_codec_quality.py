"""What codecs cost: bytes, and how well a real model still foretells a text."""

import math
import pydoc_data.topics

import numpy as np
import pytest
from keras import ops

from keras_kvcache.caches import CacheSpec, Int4
from keras_kvcache.generation import make_program

LENGTH, CHUNK = 4096, 512

# The most that perplexity may grow, by codec.
MOST = {"int8": 0.005, "int4": 0.03}


def negative_log_likelihood(lm, token_ids, codec):
    """Of `token_ids[1:]`, each after all before it, read from a cache."""

    def run_chunk(cache, token_ids, targets, index):
        logits, _, cache = lm.call_with_cache(token_ids, cache, index)
        # The first of all tokens and what is past the end have no target.
        known = ops.maximum(targets, 0)
        likelihood = ops.take_along_axis(
            ops.log_softmax(logits, axis=-1), known[..., None], axis=-1
        )[..., 0]
        return cache, -ops.sum(ops.where(targets >= 0, likelihood, 0.0))

    program = make_program(run_chunk, lm, donate=("cache",))
    targets = np.append(token_ids[1:], -1).astype("int32")
    cache, total = lm.init_cache(1, len(token_ids), codec=codec), 0.0
    for first in range(0, len(token_ids), CHUNK):
        part = slice(first, first + CHUNK)
        cache, loss = program(
            cache=cache,
            token_ids=token_ids[None, part],
            targets=targets[None, part],
            index=np.int32(first),
        )
        total += float(loss)
    return total


@pytest.mark.slow
@pytest.mark.jax_only
@pytest.mark.real_model
def test_perplexity_of_a_real_model(smollm2):
    """Python's own documentation, which comes with Python."""
    text = "\n\n".join(map(str, pydoc_data.topics.topics.values()))
    token_ids = np.array(smollm2.tokenizer.encode(text[:60_000]), "int32")[:LENGTH]
    assert len(token_ids) == LENGTH
    exact = negative_log_likelihood(smollm2, token_ids, "float32")
    assert 2 < math.exp(exact / LENGTH) < 20  # It's a text that the model understands.
    for codec, most in MOST.items():
        coded = negative_log_likelihood(smollm2, token_ids, codec)
        growth = math.exp((coded - exact) / (LENGTH - 1)) - 1
        print(f"{codec}: perplexity grows by {growth:.2%}")
        assert coded != exact
        assert growth < most, codec


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("slots", [4096, 5003])
def test_bytes_of_int4(head_dim, slots):
    """Scales, lowest values and the exact keys of a group that isn't full included."""
    for dtype in ("float32", "bfloat16"):
        int4 = CacheSpec(3, slots, 5, head_dim, codec=Int4(dtype))
        narrow = CacheSpec(3, slots, 5, head_dim, codec="bfloat16")
        assert int4.nbytes <= 0.30 * narrow.nbytes
